"""Provide the files of a published item as a folder, within a byte budget for all uploads."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSystem

from deployments.api.adapters import MAX_UPLOAD_FILES, PublishItem, SentFile
from deployments.byte_budget import ByteBudget
from deployments.config.source_prefixes import OVER_HTTP, SourcePrefix, SourceUri
from deployments.errors import SourceMissing, SourceRefused, SourceUnavailable, UploadDiskFull
from deployments.publishing.adapter_folders import ADAPTER_FILES, folder_bytes
from deployments.publishing.http_sources import CHUNK_BYTES, BoundedCopy, TakeBytes, copy_over_http
from deployments.publishing.ssrf_guard import pin_public_address
from lora_store import AdapterRefused

MAX_WAIT_S = 60.0  # longest wait of a stage for room in the byte budget
_MAX_NAME_BYTES = 255
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
ReadParts = Callable[[str, int], Iterable[bytes]]
"""Return the parts of a sent file, by its id and size."""


@contextmanager
def disk_full_reported() -> Iterator[None]:
    """Raise UploadDiskFull instead of an error of a full disk. Errors of the store's own disk are not OSErrors."""
    try:
        yield
    except (OSError, SourceUnavailable) as exc:
        cause = exc if isinstance(exc, OSError) else exc.__cause__
        if isinstance(cause, OSError) and cause.errno in _DISK_FULL:
            raise UploadDiskFull from exc
        raise


@contextmanager
def open_folder(
    upload: PublishItem,
    prefixes: Sequence[str],
    max_bytes: int,
    budget: ByteBudget | None = None,
    read_parts: ReadParts = lambda id, num_bytes: (),
    wait_s: float = MAX_WAIT_S,
) -> Iterator[tuple[Path, bool]]:
    """Yield the upload as a folder, and whether it is a copy, which no other process changes and which is removed.

    Its bytes count against `budget` before they are copied or read, until the block ends; it waits `wait_s` for them. A
    disk that is full in the block is UploadDiskFull.
    Raises: AdapterRefused, SourceRefused, SourceMissing, SourceUnavailable, UploadMemoryFull, UploadDiskFull.
    """
    with ExitStack() as stack:
        stack.enter_context(disk_full_reported())

        def take(num_bytes: int) -> None:
            if budget is not None:
                stack.enter_context(budget.taken(upload.tenant, num_bytes, wait_s))

        if upload.path is not None:
            if not os.path.isdir(upload.path):  # unlike Path.is_dir it never raises
                raise SourceMissing(str(upload.path))
            take(folder_bytes(upload.path))
            yield upload.path, False
            return
        made = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraretriever-upload-")))
        if upload.source is not None:
            folder = folder_of_source(upload.source, prefixes, made, max_bytes, take)
            yield folder, folder.is_relative_to(made)
            return
        assert upload.files is not None
        problems = [*file_problems(list(upload.files)), *_size_problems(upload.files, max_bytes)]
        if problems:
            raise AdapterRefused(upload.adapter_name[:100], problems)
        take(sum(map(len, upload.files.values())))
        for name, data in upload.files.items():
            with (made / name).open("wb") as file:
                file.writelines(read_parts(data.id, len(data)) if isinstance(data, SentFile) else [data])
        yield made, True


def file_problems(names: Sequence[str]) -> Iterator[str]:
    """Return the problems of the names of uploaded files: each must be a plain file name without a path."""
    if not names:
        yield "it has no files"
    if len(names) > MAX_UPLOAD_FILES:
        yield f"it has {len(names)} files, at most {MAX_UPLOAD_FILES}"
        return
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield f"the file {name[:100]!r} is given {names.count(name)} times"
        if not _is_plain(name):
            yield f"the file name {name[:100]!r} must be a plain name: no path, no control characters"


def _is_plain(name: str) -> bool:
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        return False
    return len(name.encode("utf-8", "replace")) <= _MAX_NAME_BYTES


def _size_problems(files: Mapping[str, bytes | SentFile], max_bytes: int) -> Iterator[str]:
    num_bytes = sum(map(len, files.values()))
    if num_bytes > max_bytes:
        yield f"its files have {num_bytes} bytes, at most {max_bytes}"


def folder_of_source(
    uri: str, prefixes: Sequence[str], work: Path, max_bytes: int, take: TakeBytes = lambda _: None
) -> Path:
    """Return the folder at `uri`: itself if it is local, otherwise a copy of its adapter's files below `work`.

    `take` is called with the number of bytes before files are copied or read, and may wait.
    Raises: SourceRefused, SourceMissing, SourceUnavailable; AdapterRefused above `max_bytes`.
    """
    place, prefix = _allowed(uri, prefixes)
    inner = place.parts[len(prefix.uri.parts) :]
    if place.scheme == "file":
        folder = _local_folder(uri, Path("/", *prefix.uri.parts), inner)
        take(folder_bytes(folder))
        return folder
    if place.scheme in OVER_HTTP:
        return copy_over_http(uri, place, work, max_bytes, take)
    assert prefix.location is not None, "only sources over HTTP have no location"
    try:
        files, root = pin_public_address(uri, prefix.location).filesystem()
        return _copy(uri, files, "/".join((root, *inner)), work, max_bytes, take)
    except (OSError, pa.ArrowException) as exc:
        raise SourceUnavailable(uri, str(exc)) from exc


def _allowed(uri: str, prefixes: Sequence[str]) -> tuple[SourceUri, SourcePrefix]:
    try:
        place = SourceUri.parse(uri)
    except ValueError as exc:
        raise SourceRefused(uri, str(exc)) from exc
    for prefix in map(SourcePrefix.parse, prefixes):
        if place.is_below(prefix.uri):
            return place, prefix
    raise SourceRefused(
        uri,
        "is not below a source prefix of this server: let the operator add it to the setting source_prefixes, or"
        " download it and publish the folder",
    )


def _local_folder(uri: str, prefix: Path, inner: Sequence[str]) -> Path:
    try:
        folder = prefix.joinpath(*inner).resolve()
    except (OSError, RuntimeError) as exc:  # Python 3.11 raises RuntimeError for a loop of links
        raise SourceMissing(uri) from exc
    if not folder.is_relative_to(prefix.resolve()):
        raise SourceRefused(uri, "leads out of its source prefix by a symbolic link")
    if not os.path.isdir(folder):  # unlike Path.is_dir it never raises
        raise SourceMissing(uri)
    return folder


def _copy(uri: str, files: FileSystem, root: str, work: Path, max_bytes: int, take: TakeBytes) -> Path:
    infos: list[FileInfo] = files.get_file_info([f"{root}/{name}" for name in ADAPTER_FILES])
    found = [info for info in infos if info.is_file]
    if not found:
        raise SourceMissing(uri)
    take(min(sum(info.size or 0 for info in found), max_bytes))
    copy = BoundedCopy(root.rpartition("/")[2], max_bytes)
    for info in found:
        with files.open_input_stream(info.path) as stream, (work / info.base_name).open("wb") as target:
            while chunk := stream.read(CHUNK_BYTES):
                copy.write(target, chunk)
    return work
