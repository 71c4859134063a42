"""The parquet input of an offline run: its identity, and its rows by position."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSelector, FileSystem, FileType

from deployments.errors import BatchRefused
from lora_store import Location

_HASHED_BYTES = 1 << 20
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class InputFile:
    """One parquet file. `path`: its path on the filesystem."""

    path: str
    num_rows: int
    sha256: str


@dataclass(frozen=True)
class BatchInput:
    """The rows of all files, in the order of their paths. It is small, because every actor gets a copy."""

    uri: str
    files: tuple[InputFile, ...]
    schema: pa.Schema

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)

    @cached_property
    def starts(self) -> list[int]:
        """Return the position of each file's first row."""
        return [0, *accumulate(file.num_rows for file in self.files)][:-1]


def scan(uri: str) -> BatchInput:
    """Read the parquet file at `uri`, or all parquet files in that folder, once to identify them.

    Raises: BatchRefused.
    """
    try:
        files, root = Location(uri).filesystem()
        paths = _parquet_files(files, root)
        if not paths:
            raise BatchRefused(f"no parquet file at {uri}")
        found = [(path, *_read_footer(files, path)) for path in paths]
        schema = found[0][1]
        for path, columns, _ in found:
            if not columns.equals(schema):
                raise BatchRefused(f"{path} has other columns than {found[0][0]}")
        known = tuple(InputFile(path, num_rows, _sha256(files, path)) for path, _, num_rows in found)
    except (OSError, ValueError, pa.ArrowException) as exc:
        raise BatchRefused(f"{uri} cannot be read: {exc}") from exc
    return BatchInput(uri, known, schema)


def _parquet_files(files: FileSystem, root: str) -> list[str]:
    if files.get_file_info(root).type == FileType.File:
        return [root]
    found = files.get_file_info(FileSelector(root, allow_not_found=True))
    return sorted(
        i.path for i in found if i.is_file and i.base_name.endswith(".parquet") and i.base_name[0] not in "._"
    )


def _read_footer(files: FileSystem, path: str) -> tuple[pa.Schema, int]:
    """Return the columns of a parquet file and its number of rows."""
    with pq.ParquetFile(path, filesystem=files) as parquet:
        return parquet.schema_arrow, parquet.metadata.num_rows


def _sha256(files: FileSystem, path: str) -> str:
    digest = hashlib.sha256()
    with files.open_input_stream(path) as stream:
        while data := stream.read(_HASHED_BYTES):
            digest.update(data)
    return digest.hexdigest()


class PartReader:
    """Reads rows by position, a thousand in memory at a time. Parts in order cost one pass over the input."""

    def __init__(self, source: BatchInput) -> None:
        self._source = source
        self._files, _ = Location(source.uri).filesystem()
        self._cursor: tuple[int, _Cursor] | None = None

    def read(self, start: int, stop: int) -> pa.Table:
        """Return the rows from `start` up to `stop`."""
        pieces: list[pa.RecordBatch] = []
        for number, (begin, file) in enumerate(zip(self._source.starts, self._source.files, strict=True)):
            first, last = max(start - begin, 0), min(stop - begin, file.num_rows)
            if first < last:
                pieces += self._at(number).read(first, last)
        return pa.Table.from_batches(pieces, self._source.schema)

    def _at(self, number: int) -> _Cursor:
        if self._cursor is None or self._cursor[0] != number:
            parquet = pq.ParquetFile(self._source.files[number].path, filesystem=self._files)
            self._cursor = number, _Cursor(parquet)
        return self._cursor[1]


class _Cursor:
    """A position in one file. Moving forward decodes skipped rows of the same row group only."""

    def __init__(self, parquet: pq.ParquetFile) -> None:
        self._parquet = parquet
        sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        self._starts = [0, *accumulate(sizes)][:-1]
        self._position = self._end = 0  # rows of the batch that was decoded last
        self._batch: pa.RecordBatch | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def read(self, start: int, stop: int) -> list[pa.RecordBatch]:
        if self._batch is None or start < self._position or self._group_of(start) > self._group_of(self._end):
            self._seek(self._group_of(start))
        pieces: list[pa.RecordBatch] = []
        while True:
            first, last = max(start, self._position), min(stop, self._end)
            if self._batch is not None and first < last:
                pieces.append(self._batch.slice(first - self._position, last - first))
            if self._end >= stop:
                return pieces
            self._batch = next(self._batches)
            self._position, self._end = self._end, self._end + self._batch.num_rows

    def _seek(self, group: int) -> None:
        groups = range(group, self._parquet.num_row_groups)
        self._batches = self._parquet.iter_batches(_ROWS_AT_ONCE, row_groups=groups)
        self._position = self._end = self._starts[group]

    def _group_of(self, row: int) -> int:
        return bisect_right(self._starts, row) - 1
