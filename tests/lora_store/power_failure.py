"""A disk that keeps after a power failure only what was flushed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest


class Disk:
    """Watches what this process flushes below `root`: contents of files, and entries of folders.

    `on_flush` is called after each flush.
    """

    def __init__(self, patch: pytest.MonkeyPatch, root: Path) -> None:
        self.root = root.resolve()
        self.on_flush: Callable[[], object] = lambda: None
        self._contents: dict[tuple[int, int], bytes] = {}  # by inode and time of the last write
        self._entries: dict[Path, dict[str, int]] = {}  # names and inodes of each folder
        self._flush = os.fsync
        patch.setattr(os, "fsync", self._watched)

    def after_power_failure(self, target: Path, *, keeps_names: bool) -> Path:
        """Copy to `target` what a power failure would leave now, and return it.

        Contents that were not flushed are gone, and their files are empty. `keeps_names`: the file system kept the
        entries of folders that were not flushed; otherwise these are gone as well.
        """
        self._copy(self.root, target, keeps_names=keeps_names)
        return target

    def _watched(self, descriptor: int) -> None:
        self._flush(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            self._entries[path] = _entries_of(path)
        else:
            self._contents[status.st_ino, status.st_mtime_ns] = path.read_bytes()
        if path.is_relative_to(self.root) or path == self.root.parent:
            self.on_flush()

    def _copy(self, source: Path, target: Path, *, keeps_names: bool) -> None:
        target.mkdir()
        entries = _entries_of(source) if keeps_names else self._entries.get(source, {})
        for name, inode in entries.items():
            if not (source / name).exists():  # deleted since: the worst is that the deletion was kept
                continue
            if (source / name).is_dir():
                self._copy(source / name, target / name, keeps_names=keeps_names)
            else:
                written = (inode, (source / name).stat().st_mtime_ns)
                (target / name).write_bytes(self._contents.get(written, b""))


def _entries_of(folder: Path) -> dict[str, int]:
    return {entry.name: entry.inode() for entry in os.scandir(folder)}
