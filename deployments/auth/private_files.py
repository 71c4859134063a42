"""Hide the server's files from other users of the machine: Ray's token, sessions, logs, the pool, caches.

Anyone who reads the token can run code as this server.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class FolderNotPrivate(OSError):
    """A folder that must be private is accessible to other users."""


def keep_files_private(home: Path) -> None:
    """Make new files of this process and of those that it starts readable by their owner only.

    Ray creates `~/.ray/auth_token` readable by all users. An existing token is made private too.
    """
    os.umask(_OTHERS)
    folder = home / ".ray"
    for path in (folder, folder / "auth_token"):
        if path.exists() and _close(path) and path.is_file():
            logger.warning(
                "%s was readable by other users of this machine. It is private now. If you do not trust them, stop "
                "every Ray process of this account, delete the file and start again",
                path,
            )


def sessions_folder(environment: Mapping[str, str], user: int) -> Path:
    """Return the folder of Ray sessions: below RAY_TMPDIR or /tmp, in a folder of this user."""
    return Path(environment.get("RAY_TMPDIR") or "/tmp") / f"loraretriever-{user}" / "ray"


def make_private(folder: Path, user: int) -> None:
    """Create `folder` with mode 0700, or remove the rights of others from an existing one.

    Ray 2.60 makes a session and its parent folder world-readable whatever the umask, so the folder above both must be
    private. Raises: FolderNotPrivate: it is a link, or another user owns it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != user:
        raise FolderNotPrivate(f"{folder} is a symbolic link or belongs to another user: remove it, or set RAY_TMPDIR")
    _close(folder)


def _close(path: Path) -> bool:
    """Remove all rights of other users on `path`. Return whether they had any."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if not mode & _OTHERS:
        return False
    if path.stat().st_uid != os.geteuid():
        logger.warning("%s belongs to another user and is accessible to others; its mode was not changed", path)
        return False
    path.chmod(mode & ~_OTHERS)
    return True
