"""Provide the files of a published item as a folder, within a byte budget for all uploads."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from deployments.api.adapters import MAX_UPLOAD_FILES, PublishItem, SentFile
from deployments.byte_budget import ByteBudget
from deployments.config.source_prefixes import SourceUri
from deployments.errors import SourceMissing, SourceUnavailable, UploadDiskFull
from deployments.publishing.adapter_folders import folder_bytes
from deployments.publishing.remote_sources import folder_of_source
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


def is_copied(upload: PublishItem) -> bool:
    """Return whether `open_folder` copies this item's files, so that no other process changes them."""
    if upload.source is None:
        return upload.files is not None
    return SourceUri.parse(upload.source).scheme != "file"


@contextmanager
def open_folder(
    upload: PublishItem,
    prefixes: Sequence[str],
    max_bytes: int,
    budget: ByteBudget | None = None,
    read_parts: ReadParts = lambda id, num_bytes: (),
    wait_s: float = MAX_WAIT_S,
) -> Iterator[Path]:
    """Yield the upload as a folder, which is removed afterwards if it was made here.

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
            yield upload.path
            return
        made = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraretriever-upload-")))
        if upload.source is not None:
            yield folder_of_source(upload.source, prefixes, made, max_bytes, take)
            return
        assert upload.files is not None
        problems = [*file_problems(list(upload.files)), *_size_problems(upload.files, max_bytes)]
        if problems:
            raise AdapterRefused(upload.adapter_name[:100], problems)
        take(sum(map(len, upload.files.values())))
        for name, data in upload.files.items():
            with (made / name).open("wb") as file:
                file.writelines(read_parts(data.id, len(data)) if isinstance(data, SentFile) else [data])
        yield made


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
