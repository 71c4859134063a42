"""The catalogue's Delta table: rows are read once, appended at one version only, and kept in few files."""

from __future__ import annotations

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

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
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from lora_store.errors import StoreUnavailable
from lora_store.events import SCHEMA
from lora_store.files import Files, store_errors
from lora_store.location import Location

logger = logging.getLogger(__name__)

_COMPACT_EVERY = 100  # versions: every commit adds a file
_FILE_BYTES = 16 << 20  # a compacted file this large is not rewritten again
_MAX_READS = 5
_NUM_THREADS = 16
_PROPERTIES = {
    "delta.checkpointInterval": str(_COMPACT_EVERY),
    "delta.dataSkippingNumIndexedCols": "0",  # no statistics in the log
    "delta.logRetentionDuration": "interval 1 days",
    "delta.deletedFileRetentionDuration": "interval 1 hours",
}
_WRITER = WriterProperties(
    compression="ZSTD", default_column_properties=ColumnProperties(statistics_enabled="NONE", dictionary_enabled=False)
)
_AFTER_APPEND = PostCommitHookProperties(create_checkpoint=True, cleanup_expired_logs=False)  # it would list all logs
_LOG_FILE = re.compile(r"_delta_log/(\d{20}\.(json|checkpoint\.parquet)|_last_checkpoint)")


class EventTable:
    """The table in `location`, created when absent. For one thread at a time. Raises: StoreUnavailable."""

    def __init__(self, location: Location) -> None:
        self._files = Files(location)
        with store_errors():
            self._table = _open(location)
        self._read: frozenset[str] = frozenset()  # data files whose rows are folded in

    @property
    def version(self) -> int:
        """The version of the last refresh, or of the last append by this object."""
        version: int = self._table.version()
        return version

    def refresh(self) -> tuple[pa.Table, frozenset[str]]:
        """(rows of all data files that are new since the last `taken`, those files); a compacted one brings old rows.

        What a rival compacted and removed since the log was read is looked for again, under its new name.
        """
        for _ in range(_MAX_READS):
            with store_errors():
                self._table.update_incremental()
            names = self._data_files()
            with ThreadPoolExecutor(_NUM_THREADS) as pool:
                contents = list(pool.map(self._files.read, names - self._read))
            if None not in contents:
                with store_errors():
                    tables = [pq.read_table(pa.BufferReader(content), schema=SCHEMA) for content in contents]
                return pa.concat_tables([SCHEMA.empty_table(), *tables]), frozenset(names)
        raise StoreUnavailable("data files of the catalogue are missing")

    def taken(self, files: frozenset[str]) -> None:
        """The rows of these files are folded in, and not to be given out again."""
        self._read = files

    def append(self, rows: pa.Table, version: int) -> bool:
        """Whether the rows became `version` of the table. False: a rival's did."""
        if self.version != version - 1:  # another thread of this process went past it
            return False
        with store_errors():
            try:
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
        if version % _COMPACT_EVERY == 0:
            self.compact()
        return True

    def compact(self) -> None:
        """Small data files are one file now, unless a rival is at the same work, and the log's expired part is gone."""
        try:
            with store_errors():
                self._table.optimize.compact(target_size=_FILE_BYTES, writer_properties=_WRITER)
                self._table.cleanup_metadata()
        except StoreUnavailable as exc:  # what was committed stands either way
            logger.warning("compaction left to a later commit: %s", exc.cause)

    def tidy(self, before: datetime) -> None:
        """Of what was written before then, only the log and the data files of the newest version are there.

        A process that slept for longer between writing a data file and committing it would commit what is gone.
        """
        found = self._files.entries()  # before the refresh: what is committed meanwhile stays
        with store_errors():
            self._table.update_incremental()
        self.compact()
        with store_errors():
            self._table.create_checkpoint()
        names = self._data_files()
        stale = [file.name for file in found if file.written_at < before and file.name not in names]
        self._files.delete([name for name in stale if not _LOG_FILE.fullmatch(name)])

    def _data_files(self) -> set[str]:
        with store_errors():
            return {uri.rpartition("/")[2] for uri in self._table.file_uris()}


def _open(location: Location) -> DeltaTable:
    uri, options = location.delta_uri, location.storage_options
    try:
        return DeltaTable(uri, storage_options=options)
    except TableNotFoundError:
        logger.info("creating the catalogue at %s", uri)
    try:
        return DeltaTable.create(uri, schema=SCHEMA, mode="ignore", configuration=_PROPERTIES, storage_options=options)
    except DeltaError:
        return DeltaTable(uri, storage_options=options)  # another process created it in the same moment
