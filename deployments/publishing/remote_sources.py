"""Read adapters from a bucket, a shared folder, a model hub or MLflow: check the URI, and copy the files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSystem

from deployments.config.source_prefixes import OVER_HTTP, SourcePrefix, SourceUri
from deployments.errors import SourceMissing, SourceRefused, SourceUnavailable
from deployments.publishing.adapter_folders import ADAPTER_FILES, folder_bytes
from deployments.publishing.http_sources import CHUNK_BYTES, BoundedCopy, TakeBytes, copy_over_http
from deployments.publishing.ssrf_guard import pin_public_address


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
