"""A cache of blobs on a local disk, keyed by digest, shared by the processes of one machine, limited by a quota."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from lora_store.files import make_private_folder
from lora_store.weights_blob import hash_blob

logger = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{64}")
_LOCK, _HALF_WRITTEN = ".lock", ".half-written"
_LOCK_TIMEOUT_S, _LOCK_POLL_S = 5.0, 0.005  # the lock is held while one blob is written


class DiskCache:
    """Files named by their digest and verified on each read. The least recently used are evicted first.

    A full, read-only or missing disk never fails a request: the error is logged and counts as a cache miss.
    """

    def __init__(self, folder: Path, quota_bytes: int, *, now_ns: Callable[[], int] = time.time_ns) -> None:
        self.folder, self._quota_bytes, self._now_ns = folder, quota_bytes, now_ns

    def get(self, digest: str) -> bytes | None:
        """Return the bytes that hash to `digest`, or None. Delete a file whose content no longer matches."""
        path = self._path(digest)
        with self._logged(f"{digest} could not be read"), suppress(FileNotFoundError):
            data = path.read_bytes()
            if hash_blob(data) == digest:
                self._touch(path)
                return data
            logger.warning("the cached blob %s is damaged; deleting it", digest)
            path.unlink()
        return None

    def put(self, digest: str, *parts: bytes | memoryview) -> None:
        """Cache the bytes, which together hash to `digest`, unless they alone are larger than the quota."""
        path, num_bytes = self._path(digest), sum(map(len, parts))
        if num_bytes > self._quota_bytes or not _DIGEST.fullmatch(digest):
            return
        with self._logged(f"{digest} could not be written"):
            make_private_folder(self.folder)
            with FileLock(self.folder / _LOCK, timeout=_LOCK_TIMEOUT_S, poll_interval=_LOCK_POLL_S):
                if not path.exists():
                    self._make_room(num_bytes)
                    self._write(path, parts)

    def discard(self, digests: Collection[str]) -> None:
        """Delete these blobs from the cache."""
        with self._logged("some blobs could not be deleted"):
            for digest in digests:
                self._path(digest).unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        """Return the blob's path. A malformed digest could name another path, so it gets one that never exists."""
        return self.folder / (digest if _DIGEST.fullmatch(digest) else ".no-digest")

    def _write(self, path: Path, parts: Sequence[bytes | memoryview]) -> None:
        """Write a temporary file, then rename it, so that a file named by a digest is always complete."""
        half_written = self.folder / _HALF_WRITTEN
        try:
            half_written.touch(mode=0o600)
            with half_written.open("wb") as file:
                file.writelines(parts)
            self._touch(half_written)
            half_written.replace(path)
        finally:
            half_written.unlink(missing_ok=True)

    def _touch(self, path: Path) -> None:
        """Set the file's time of last use to now. Another process may have evicted the file meanwhile."""
        now_ns = self._now_ns()
        with self._logged(f"the last use of {path.name} could not be recorded"), suppress(FileNotFoundError):
            os.utime(path, ns=(now_ns, now_ns))

    def _make_room(self, num_bytes: int) -> None:
        """Evict files until `num_bytes` fit. The caller holds the lock, so any half-written file is abandoned."""
        (self.folder / _HALF_WRITTEN).unlink(missing_ok=True)
        files = sorted(self._files())
        too_many = sum(size for _, size, _ in files) + num_bytes - self._quota_bytes
        for _, size, path in files:
            if too_many <= 0:
                return
            path.unlink(missing_ok=True)
            too_many -= size

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Yield (last used, size, path) of every blob."""
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                if _DIGEST.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        found = entry.stat()
                        yield found.st_mtime_ns, found.st_size, Path(entry.path)

    @contextmanager
    def _logged(self, what: str) -> Iterator[None]:
        """Log an OSError and continue. A lock timeout is an OSError too."""
        try:
            yield
        except OSError as exc:
            logger.warning("disk cache %s: %s: %s", self.folder, what, exc)
