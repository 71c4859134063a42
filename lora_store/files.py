"""Objects by name in a folder, on S3 or on GCS."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import numpy as np
import pyarrow as pa
from deltalake.exceptions import DeltaError
from numpy.typing import NDArray
from pyarrow.fs import FileSelector, FileSystem

from lora_store.errors import AdapterNotFound, StoreFull, StoreUnavailable
from lora_store.location import Location

Result = TypeVar("Result")
_NUM_THREADS = 16  # requests to an endpoint at once
_COPY_TIMEOUT_S = 60
_CAUSE_CHARS = 100
_PART_BYTES = 8 << 20  # one request to an endpoint carries this many
_DECORATION = re.compile(r"\x1b\[[0-9;]*m|↳")  # Delta prints errors as coloured trees
_BACKTRACE = re.compile(r"\s+0: <unknown>.*", re.DOTALL)
_FULL = re.compile(r"No space left on device|Disk quota exceeded")  # the words of the operating system


def open_for_arrow(content: bytes) -> pa.BufferReader:
    """Return a file of these bytes for Arrow, which copies them.

    Arrow's threads may hold a file until the process ends. With Python's own bytes they would abort the process then.
    """
    sink = pa.BufferOutputStream()
    sink.write(content)
    return pa.BufferReader(sink.getvalue())


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One object. `name` is its path below the location that was listed."""

    name: str
    num_bytes: int
    written_at: datetime  # UTC


class Files:
    """The objects below one location. An object is complete or absent, never partial. Raises: StoreUnavailable."""

    def __init__(self, location: Location) -> None:
        self._location, self._is_local = location, location.is_local
        with store_errors():
            self._files, self._root = location.filesystem()

    def read(self, name: str) -> bytes | None:
        """Return the object's bytes, or None if there is no such object."""
        return self._consume(name, lambda file: bytes(file.read()))

    def read_parts(self, name: str, part_bytes: int) -> Iterator[NDArray[np.uint8]]:
        """Yield the object's bytes in order, each part in new memory. Without such an object, yield nothing.

        Each part is (N,) with N = `part_bytes`, except the last. An empty object has one empty part.
        Raises: AdapterNotFound if it is deleted while it is read.
        """
        with store_errors():
            try:
                file = self._files.open_input_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return
            with file:
                num_bytes = file.size()
                for start in range(0, max(num_bytes, 1), part_bytes):
                    part = np.empty(min(part_bytes, num_bytes - start), np.uint8)
                    try:
                        if file.readinto(part) != len(part):
                            raise OSError(f"{name} became shorter while it was read")
                    except OSError as exc:
                        if self.contains(name):
                            raise
                        raise AdapterNotFound(name.rpartition("/")[2]) from exc
                    yield part

    def read_part(self, name: str, start: int, num_bytes: int) -> bytes | None:
        """Return at most this many bytes from `start` on, or None if there is no such object."""
        return self._consume(name, lambda file: bytes(file.read_at(num_bytes, start)))

    def digest(self, name: str) -> str | None:
        """Return the sha256 of the object's bytes, read in parts, or None if there is no such object."""
        return self._consume(name, _sha256)

    def _consume(self, name: str, consume: Callable[[pa.NativeFile], Result]) -> Result | None:
        """Return what `consume` makes of the open object, or None if there is no such object."""
        with store_errors():
            try:
                # A file of known size is read by one request; a stream would be read in parts of 256 KiB.
                file = self._files.open_input_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return None
            with file:
                try:
                    return consume(file)
                except OSError:
                    if self.contains(name):
                        raise
                    return None  # deleted after it was opened: pyarrow 26 reports a broken stream

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Write or replace the object. With `durable`, an object in a folder survives a power failure."""
        self.write_pieces(name, [data], durable=durable)

    def write_pieces(self, name: str, pieces: Iterable[bytes | memoryview], *, durable: bool = True) -> None:
        """Write or replace the object with these pieces, in order."""
        path = f"{self._root}/{name}"
        with store_errors():
            if self._is_local:
                _write_local(Path(path), pieces, durable=durable)
            else:
                self._write_object(path, iter(pieces))

    def _write_object(self, path: str, pieces: Iterator[bytes | memoryview]) -> None:
        """Write an object of a bucket, and leave what has its name as it is if that fails.

        pyarrow stores an upload of several parts even if one of them failed, so such an object is copied to its name
        by the endpoint once it is whole. A small object is one request.
        """
        first: list[bytes | memoryview] = []
        num_bytes = 0
        for piece in pieces:
            first.append(piece)
            num_bytes += len(piece)
            if num_bytes > _PART_BYTES:
                break
        if num_bytes <= _PART_BYTES:
            self._upload(path, first)
            return
        temporary = _name_temporary(Path(path)).as_posix()
        try:
            self._upload(temporary, chain(first, pieces))
            self._copying_files.copy_file(temporary, path)
        finally:
            with suppress(OSError):  # gc deletes it then
                self._files.delete_file(temporary)

    def _upload(self, path: str, pieces: Iterable[bytes | memoryview]) -> None:
        with self._files.open_output_stream(path) as stream:
            for piece in pieces:
                stream.write(piece)

    @cached_property
    def _copying_files(self) -> FileSystem:
        """The file system with time for a copy, for which some endpoints send no byte until it is done."""
        return self._location.filesystem(_COPY_TIMEOUT_S)[0]

    def flush(self, names: Collection[str]) -> None:
        """Make these objects survive a power failure, where they are files that exist. A bucket needs no flush."""
        if not self._is_local:
            return
        with store_errors():
            paths = [Path(self._root, name) for name in names]
            for path in paths:
                with suppress(FileNotFoundError):
                    flush_to_disk(path)
            for folder in {folder for path in paths for folder in (path.parent, path.parent.parent)}:
                with suppress(FileNotFoundError):
                    flush_to_disk(folder)

    def entries(self, folder: str = "") -> list[StoredFile]:
        """Return every file below this location, or a folder of it, including what a crash left half-written."""
        below = FileSelector(f"{self._root}/{folder}".rstrip("/"), recursive=True, allow_not_found=True)
        with store_errors():
            try:
                found = self._files.get_file_info(below)
            except FileNotFoundError:  # pyarrow 26, if another process creates the folder during the listing
                found = self._files.get_file_info(below)
        prefix_len = len(self._root) + 1
        return [StoredFile(info.path[prefix_len:], info.size, info.mtime) for info in found if info.is_file]

    def contains(self, name: str) -> bool:
        """Return whether the object exists."""
        with store_errors():
            return bool(self._files.get_file_info(f"{self._root}/{name}").is_file)

    def delete(self, names: Collection[str]) -> list[str]:
        """Delete these objects. Return the names that existed."""
        if len(names) < 2:
            return [name for name in names if self._delete(name)]
        with ThreadPoolExecutor(min(_NUM_THREADS, len(names))) as pool:
            return [name for name, existed in zip(names, pool.map(self._delete, names), strict=True) if existed]

    def _delete(self, name: str) -> bool:
        with store_errors():
            try:
                self._files.delete_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return False
            return True


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn errors of the disk or the endpoint into StoreUnavailable, or StoreFull, with a short cause."""
    try:
        yield
    except (OSError, DeltaError, pa.ArrowException) as exc:
        kind = StoreFull if _FULL.search(str(exc)) else StoreUnavailable
        raise kind(short_cause(exc)) from exc


def _sha256(file: pa.NativeFile) -> str:
    hashed = hashlib.sha256()
    while part := file.read(_PART_BYTES):
        hashed.update(part)
    return hashed.hexdigest()


def hash_file(path: Path) -> str:
    """Return the sha256 of a file on this machine. Raises: OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_cause(error: Exception) -> str:
    """Return the message of an error of the disk, the endpoint or a library on one line, shortened."""
    text = _BACKTRACE.sub("", _DECORATION.sub(" ", str(error)))
    cause = " ".join(text.split()) or type(error).__name__
    # The beginning names the attempt, the end names its outcome.
    return cause if len(cause) <= 2 * _CAUSE_CHARS else f"{cause[:_CAUSE_CHARS]} … {cause[-_CAUSE_CHARS:]}"


def create_file(path: Path, data: bytes) -> bool:
    """Write a new file that survives a power failure. Return False if there is such a file; it is not changed then.

    The file is complete and flushed before it gets its name. Its folder must exist.
    """
    temporary = _name_temporary(path)
    try:
        _write_private(temporary, [data], durable=True)
        os.link(temporary, path)
    except FileExistsError:
        with temporary.open("rb") as file:  # opened, since NFS asks the server then
            num_names = os.fstat(file.fileno()).st_nlink
        if num_names != 2:  # otherwise NFS repeated a link that it had made, and found the name taken
            return False
    finally:
        temporary.unlink(missing_ok=True)
    flush_to_disk(path.parent)
    return True


def _name_temporary(path: Path) -> Path:
    """Return a new name beside this one. Listings know by its leading dot that the file may not be whole."""
    return path.with_name(f".{path.name}.{uuid4().hex}")


def _write_local(path: Path, pieces: Iterable[bytes | memoryview], *, durable: bool) -> None:
    make_private_folder(path.parent)
    temporary = _name_temporary(path)
    try:
        _write_private(temporary, pieces, durable=durable)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        flush_to_disk(path.parent)
        flush_to_disk(path.parent.parent)  # another process may have created the folder a moment ago


def _write_private(path: Path, pieces: Iterable[bytes | memoryview], *, durable: bool) -> None:
    with open(path, "xb", opener=_private) as file:
        _give_to_owner(path)
        file.writelines(pieces)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def make_private_folder(folder: Path) -> None:
    """Create the folder and its missing parents, accessible only to their owner, and flush the new ones."""
    if folder.is_dir():
        return
    for part in reversed([folder, *folder.parents]):
        if not part.is_dir():
            part.mkdir(mode=0o700, exist_ok=True)
            _give_to_owner(part)
            flush_to_disk(part.parent)


def _give_to_owner(path: Path) -> None:
    """Give what root created to the owner of its folder, whose server could not read it otherwise."""
    if os.geteuid() == 0:
        owner = path.parent.stat()
        with suppress(OSError):  # NFS may refuse it
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def flush_to_disk(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk, so that they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
