"""Content-addressed bytes on any pyarrow filesystem: a folder, S3, GCS."""

from __future__ import annotations

import re
from pathlib import Path
from uuid import uuid4

from pyarrow.fs import FileSystem, FileType

from lora_store.errors import AdapterNotFound, BlobCorrupted
from lora_store.weights_blob import digest_of

_DIGEST = re.compile(r"[0-9a-f]{64}")


def locate(uri: str) -> tuple[FileSystem, str]:
    """The filesystem a URI or a local path lies on, and the path there."""
    located: tuple[FileSystem, str] = FileSystem.from_uri(uri if "://" in uri else str(Path(uri).absolute()))
    return located


class BlobStore:
    """Blobs under `uri`, each named by its sha256. What is there under its name is whole: it came by a move."""

    def __init__(self, uri: str) -> None:
        self._files, self._root = locate(uri)

    def put(self, data: bytes) -> str:
        """The digest `data` can be read by from now on. A blob already there is kept; a corrupted one is replaced."""
        digest = digest_of(data)
        path = self._path(digest)
        if self._read(path) != data:
            self._write(path, data)
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes that hash to `digest`. Raises: AdapterNotFound; BlobCorrupted (publish the adapter again)."""
        data = self._read(self._path(digest)) if _DIGEST.fullmatch(digest) else None
        if data is None:
            raise AdapterNotFound(digest)
        found = digest_of(data)
        if found != digest:
            raise BlobCorrupted(digest, found)
        return data

    def __contains__(self, digest: str) -> bool:
        return bool(self._files.get_file_info(self._path(digest)).type == FileType.File)

    def _path(self, digest: str) -> str:
        return f"{self._root}/{digest[:2]}/{digest}"

    def _read(self, path: str) -> bytes | None:
        try:
            with self._files.open_input_stream(path) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None

    def _write(self, path: str, data: bytes) -> None:
        folder, _, name = path.rpartition("/")
        self._files.create_dir(folder, recursive=True)
        staged = f"{folder}/.{name}.{uuid4().hex}"
        try:
            with self._files.open_output_stream(staged) as stream:
                stream.write(data)
            self._files.move(staged, path)
        except OSError:
            if self._files.get_file_info(staged).type == FileType.File:
                self._files.delete_file(staged)
            raise
