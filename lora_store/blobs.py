"""Content-addressed bytes on a folder, S3 or GCS."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from lora_store.errors import AdapterNotFound, BlobCorrupted
from lora_store.files import Files
from lora_store.location import Location
from lora_store.weights_blob import hash_blob

_DIGEST = re.compile(r"[0-9a-f]{64}")
_PART_BYTES = 32 << 20
_NUM_THREADS = 16  # requests to an endpoint at once
_NAME = re.compile(r"[0-9a-f]{2}/(\.?)([0-9a-f]{64})(?:\.[0-9a-f]+)?")  # a leading dot marks a write in progress


@dataclass(frozen=True, slots=True)
class BlobFile:
    """A stored file of one blob."""

    name: str
    num_bytes: int
    written_at: datetime  # UTC
    digest: str
    is_whole: bool


class BlobStore:
    """Blobs in `location`, each named by its sha256. A blob appears under its name once it is complete.

    Raises: StoreUnavailable.
    """

    def __init__(self, location: Location) -> None:
        self._files = Files(location)

    def put(self, data: bytes) -> str:
        """Store `data` and return its digest. Keep an existing blob; replace a corrupted one."""
        digest = hash_blob(data)
        self.put_pieces(digest, lambda: [data])
        return digest

    def put_pieces(self, digest: str, pieces: Callable[[], Iterable[bytes | memoryview]]) -> None:
        """Store bytes that hash to `digest`, as `put` does, without holding all of them in memory."""
        if self._files.digest(_name(digest)) == digest:
            self._files.flush([_name(digest)])  # its writer may not have come so far
        else:
            self._files.write_pieces(_name(digest), pieces())

    def get(self, digest: str) -> bytes:
        """Return the bytes that hash to `digest`. Raises: AdapterNotFound, BlobCorrupted."""
        data = self._files.read(_name(digest)) if _DIGEST.fullmatch(digest) else None
        if data is None:
            raise AdapterNotFound(digest)
        found = hash_blob(data)
        if found != digest:
            raise BlobCorrupted(digest, found)
        return data

    def read_parts(self, digest: str) -> Iterator[NDArray[np.uint8]]:
        """Yield the stored bytes in order, in parts of up to 32 MiB, not hashed. Raises: AdapterNotFound."""
        parts = self._files.read_parts(_name(digest), _PART_BYTES) if _DIGEST.fullmatch(digest) else iter(())
        first = next(parts, None)
        if first is None:
            raise AdapterNotFound(digest)
        yield first
        yield from parts

    def check(self, digest: str) -> None:
        """Read and hash the stored bytes, part by part. Raises: AdapterNotFound, BlobCorrupted."""
        found = self._files.digest(_name(digest)) if _DIGEST.fullmatch(digest) else None
        if found is None:
            raise AdapterNotFound(digest)
        if found != digest:
            raise BlobCorrupted(digest, found)

    def __contains__(self, digest: str) -> bool:
        return self._files.contains(_name(digest))

    def missing(self, digests: Collection[str]) -> list[str]:
        """Return those of these blobs that do not exist."""
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            return [
                digest
                for digest, is_there in zip(digests, pool.map(self.__contains__, digests), strict=True)
                if not is_there
            ]

    def delete(self, digests: Collection[str]) -> list[str]:
        """Delete these blobs. Return the digests that existed."""
        names = [_name(digest) for digest in digests if _DIGEST.fullmatch(digest)]
        return [name.rpartition("/")[2] for name in self._files.delete(names)]

    def files(self) -> list[BlobFile]:
        """Return every stored file, including files that a crash left half-written."""
        found = []
        for file in self._files.entries():
            if match := _NAME.fullmatch(file.name):
                found.append(BlobFile(file.name, file.num_bytes, file.written_at, match[2], is_whole=not match[1]))
        return found

    def delete_files(self, files: Collection[BlobFile]) -> None:
        """Delete these files."""
        self._files.delete([file.name for file in files])


def _name(digest: str) -> str:
    return f"{digest[:2]}/{digest}"
