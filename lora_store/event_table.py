"""The catalogue's Delta table: each row is read once, each append targets one version, and the files stay few."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import (
    ColumnProperties,
    CommitProperties,
    DeltaTable,
    PostCommitHookProperties,
    WriterProperties,
    write_deltalake,
)
from deltalake import Field as DeltaField
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from lora_store.errors import StoreUnavailable
from lora_store.events import SCHEMA
from lora_store.files import Files, make_private_folder, store_errors
from lora_store.location import Location

logger = logging.getLogger(__name__)

COMPACT_EVERY = 100  # versions; every commit adds a file
_FILE_BYTES = 16 << 20  # a compacted file of this size is not rewritten again
_MAX_READS = 5
_NUM_THREADS = 16
_PROPERTIES = {
    "delta.checkpointInterval": str(COMPACT_EVERY),
    "delta.dataSkippingNumIndexedCols": "0",  # keep statistics out of the log
    "delta.logRetentionDuration": "interval 1 days",
    "delta.deletedFileRetentionDuration": "interval 1 hours",
}
_WRITER = WriterProperties(
    compression="ZSTD", default_column_properties=ColumnProperties(statistics_enabled="NONE", dictionary_enabled=False)
)
_AFTER_APPEND = PostCommitHookProperties(create_checkpoint=True, cleanup_expired_logs=False)  # cleanup lists all logs
_FOLD_FILE = re.compile(r"fold-(\d{20})-")
_LOG_FILE = re.compile(r"_delta_log/(\d{20}\.(json|checkpoint\.parquet)|_last_checkpoint)")


class EventTable:
    """The table in `location`, created if absent. Use it from one thread at a time. Raises: StoreUnavailable."""

    def __init__(self, location: Location) -> None:
        self._location, self._files = location, Files(location)
        with store_errors():
            self._table = _open(location)
        self._read: frozenset[str] = frozenset()  # data files whose rows were applied

    @property
    def version(self) -> int:
        """The version as of the last refresh, or as of the last append by this object."""
        version: int = self._table.version()
        return version

    @property
    def read_files(self) -> frozenset[str]:
        """The data files of that version, all of which were read and applied."""
        return self._read

    @property
    def fold_generation(self) -> int:
        """The generation of the newest fold stored in its own data file, or 0."""
        return max(map(_generation_of, self._read), default=0)

    def refresh(self, seen: int = 0) -> tuple[pa.Table, frozenset[str]]:
        """Return the rows of all data files that are new since the last `mark_read`, and the names of all data files.

        A compacted file contains old rows too. Skip folds up to generation `seen`. If a rival compacted and deleted
        files after the log was read, read the log again.
        """
        for _ in range(_MAX_READS):
            self.update()
            names = self._data_files()
            contents = self._contents({name for name in names - self._read if not 0 < _generation_of(name) <= seen})
            if contents is not None:
                return _rows_of(contents), frozenset(names)
        raise StoreUnavailable("data files of the catalogue are missing")

    def update(self) -> None:
        """Read the log up to its newest version."""
        with store_errors():
            self._table.update_incremental()

    def rows_at(self, version: int) -> pa.Table | None:
        """Return all rows as of an older version, or None if its log or its data files were deleted."""
        uri, options = self._location.delta_uri, self._location.storage_options
        try:
            older = DeltaTable(uri, version=version, storage_options=options)
        except DeltaError:
            return None
        with store_errors():
            contents = self._contents({file.rpartition("/")[2] for file in older.file_uris()})
        return None if contents is None else _rows_of(contents)

    def mark_read(self, files: frozenset[str]) -> None:
        """Record that the rows of these files were applied, so that they are not returned again."""
        self._read = files

    def append(self, rows: pa.Table, version: int) -> bool:
        """Append the rows as `version` of the table. Return False if a rival took that version."""
        if self.version != version - 1:  # another thread of this process took it
            return False
        with store_errors():
            try:
                if not self._has_all_columns():
                    return False
                write_deltalake(
                    self._table,
                    rows,
                    mode="append",
                    writer_properties=_WRITER,
                    commit_properties=CommitProperties(max_commit_retries=0),
                    post_commithook_properties=_AFTER_APPEND,
                )
            except CommitFailedError:
                logger.info("version %d was taken by another writer", version)
                return False
        return True

    def fold(self, parts: Iterable[pa.Table], generation: int, covered: Collection[str]) -> None:
        """Replace the data files `covered`, which hold rows up to `generation`, by the rows of one fold.

        The new files become part of the table only with the commit. A concurrent append is kept. Two concurrent folds
        both remain, and readers use the newer one.
        """
        with store_errors():
            try:
                while not self._has_all_columns():
                    self.update()
                actions: list[AddAction | RemoveAction] = [self._write(part, generation) for part in parts]
                self.update()
                now_ms = int(time.time() * 1000)
                stale = sorted(self._data_files().intersection(covered))
                actions += [RemoveAction(name, False, now_ms, partition_values={}) for name in stale]
                self._table.create_write_transaction(
                    actions, "append", self._table.schema(), post_commithook_properties=_AFTER_APPEND
                )
                self.update()  # deltalake 1.6 does not update its own state after such a transaction
                self._table.create_checkpoint()
                self._table.cleanup_metadata()
            except CommitFailedError as exc:
                logger.info("generation %d was not folded; a later commit will fold: %s", generation, exc)

    def compact(self) -> None:
        """Merge small data files into one and delete expired log files. Do nothing if a rival compacts too."""
        try:
            self.update()  # otherwise files that were replaced meanwhile would be merged again
            with store_errors():
                self._table.optimize.compact(target_size=_FILE_BYTES, writer_properties=_WRITER)
                self._table.cleanup_metadata()
        except StoreUnavailable as exc:  # committed data is not affected
            logger.warning("cannot compact the catalogue now; a later commit will: %s", exc.cause)

    def vacuum(self, before: datetime) -> None:
        """Delete files written before this time, except the log and the data files of the newest version.

        A process that paused for longer between writing a data file and committing it would commit a deleted file.
        """
        found = self._files.entries()  # list before the refresh, so that files committed meanwhile are kept
        with store_errors():
            self._table.update_incremental()
        self.compact()
        with store_errors():
            self._table.create_checkpoint()
        names = self._data_files()
        stale = [file.name for file in found if file.written_at < before and file.name not in names]
        self._files.delete([name for name in stale if not _LOG_FILE.fullmatch(name)])

    def _contents(self, names: Collection[str]) -> list[bytes] | None:
        """Return the bytes of these data files, or None if one is missing."""
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            found = list(pool.map(self._files.read, names))
        contents = [content for content in found if content is not None]
        return contents if len(contents) == len(found) else None

    def _has_all_columns(self) -> bool:
        """Return whether the table has every column of SCHEMA. If not, add the missing ones and return False."""
        known = {field.name for field in self._table.schema().fields}
        lacking = [DeltaField.from_arrow(field) for field in SCHEMA if field.name not in known]
        if lacking:
            logger.info("adding columns to the catalogue: %s", ", ".join(field.name for field in lacking))
            self._table.alter.add_columns(lacking)
        return not lacking

    def _write(self, rows: pa.Table, generation: int) -> AddAction:
        """Write a data file with these rows. It becomes part of the table when the returned action is committed."""
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink, compression="zstd", use_dictionary=False, write_statistics=False)
        data = sink.getvalue()
        name = f"fold-{generation:020}-{uuid4()}.zstd.parquet"
        self._files.write(name, data)
        return AddAction(name, data.size, {}, int(time.time() * 1000), False, "{}")

    def _data_files(self) -> set[str]:
        with store_errors():
            return {uri.rpartition("/")[2] for uri in self._table.file_uris()}


def _rows_of(contents: Sequence[bytes]) -> pa.Table:
    """Return the rows of these data files. Columns that an earlier version did not write are null."""
    with store_errors():
        tables = [pq.read_table(pa.BufferReader(content), schema=SCHEMA) for content in contents]
    return pa.concat_tables([SCHEMA.empty_table(), *tables])


def _generation_of(name: str) -> int:
    """Return the generation of a fold from the name of its data file, or 0 for another file."""
    match = _FOLD_FILE.match(name)
    return int(match[1]) if match else 0


def _open(location: Location) -> DeltaTable:
    uri, options = location.delta_uri, location.storage_options
    try:
        return DeltaTable(uri, storage_options=options)
    except TableNotFoundError:
        logger.info("creating the catalogue at %s", uri)
    if location.is_local:  # deltalake writes with the process's umask, so a private folder keeps others out
        make_private_folder(Path(uri))
        make_private_folder(Path(uri, "_delta_log"))
    try:
        return DeltaTable.create(uri, schema=SCHEMA, mode="ignore", configuration=_PROPERTIES, storage_options=options)
    except DeltaError:
        return DeltaTable(uri, storage_options=options)  # another process created it at the same moment
