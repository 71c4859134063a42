"""Keep what this server writes from other users of the machine: Ray's token, sessions, logs, the pool, caches.

On a shared machine the token is as good as the server's account, so it must not be readable by others.
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
    """A folder that must be this user's alone is not."""


def keep_files_private(home: Path) -> None:
    """Make new files of this process and of those that it starts readable by their owner only.

    Ray creates `~/.ray/auth_token` readable by everybody. A token that is there already is closed too.
    """
    os.umask(_OTHERS)
    folder = home / ".ray"
    for path in (folder, folder / "auth_token"):
        if path.exists() and _close(path) and path.is_file():
            logger.warning(
                "%s was readable by other users of this machine. It is closed now; if you do not trust them, stop "
                "every Ray of this account, delete the file and start again",
                path,
            )


def sessions_folder(environment: Mapping[str, str], user: int) -> Path:
    """Return where the sessions of `loraretriever serve` are: below RAY_TMPDIR or /tmp, in a folder of this user."""
    return Path(environment.get("RAY_TMPDIR") or "/tmp") / f"loraretriever-{user}" / "ray"


def make_private(folder: Path, user: int) -> None:
    """Create `folder`, or close an existing one, so that only `user` reaches what is below it.

    Ray 2.60 opens a session and the folder around it to everybody, whatever the umask, so the folder around both must
    be closed. Raises: FolderNotPrivate: it is a link, or another user's.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != user:
        raise FolderNotPrivate(f"{folder} is a link or belongs to another user: remove it, or set RAY_TMPDIR")
    _close(folder)


def _close(path: Path) -> bool:
    """Take all rights on `path` from others. Return whether they had any."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if not mode & _OTHERS:
        return False
    if path.stat().st_uid != os.geteuid():
        logger.warning("%s belongs to another user and is open to others; its rights stay as they are", path)
        return False
    path.chmod(mode & ~_OTHERS)
    return True
