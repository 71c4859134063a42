"""The catalogue's Delta table: each row is read once, each append targets one version, and the files stay few.

In a folder this module writes every data file and commit itself. Each is flushed before it becomes visible, data
before the commit that names it, so a power failure leaves whole versions only. An endpoint does that for each object,
and `deltalake` commits there.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
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

from lora_store.data_files import all_columns_in, make_commit, rows_in, write_rows
from lora_store.errors import StoreDamaged, StoreUnavailable
from lora_store.events import SCHEMA
from lora_store.files import Files, create_file, make_private_folder, short_cause, store_errors
from lora_store.location import Location
from lora_store.table_format import COLUMN, KEY, OURS, TableFormat
from lora_store.table_log import (
    EMPTY,
    LAST_CHECKPOINT,
    LOG,
    MISSING,
    check_sizes,
    checkpoint_name,
    commit_name,
    newest_checkpoint,
    read_log,
)

logger = logging.getLogger(__name__)

COMPACT_EVERY = 100  # versions; every commit adds a file
_FILE_BYTES = 16 << 20  # a compacted file of this size is not rewritten again
_MAX_READS = 5
_MAX_COMMITS = 16  # attempts to replace data files; each fails only if a rival commits meanwhile
_NUM_THREADS = 16
_COPY = "a copy of a pool"  # the description of a table that is younger than its blobs
_PROPERTIES = {
    "delta.checkpointInterval": str(COMPACT_EVERY),
    "delta.dataSkippingNumIndexedCols": "0",  # keep statistics out of the log
    "delta.logRetentionDuration": "interval 1 days",
    "delta.deletedFileRetentionDuration": "interval 1 hours",
}
_WRITER = WriterProperties(
    compression="ZSTD", default_column_properties=ColumnProperties(statistics_enabled="NONE", dictionary_enabled=False)
)
_ONCE = CommitProperties(max_commit_retries=0)
_AFTER_COMMIT = PostCommitHookProperties(create_checkpoint=True, cleanup_expired_logs=False)  # cleanup lists all logs
_FOLD_FILE = re.compile(r"fold-(\d{20})-")
_LOG_FILE = re.compile(r"_delta_log/(\d{20}\.(json|checkpoint\.parquet)|_last_checkpoint)")


class EventTable:
    """The table in `location`, which `create_table` made. Use it from one thread at a time.

    Raises: StoreUnavailable; StoreDamaged for a file that is missing or unreadable; StoreIsNewer.
    """

    def __init__(self, location: Location) -> None:
        self._location, self._files = location, Files(location)
        with self._errors():
            try:
                self._table = DeltaTable(location.delta_uri, storage_options=location.storage_options)
            except TableNotFoundError as exc:
                raise StoreDamaged(self._path(LOG), MISSING) from exc
        check_sizes(self._files, location.delta_uri)
        self._num_checked = self.version  # the version up to which no commit is empty
        self.format.check_readable()
        self.read_files: frozenset[str] = frozenset()  # data files whose rows were applied
        self.has_unknown = False  # whether a row was read with a value or of a kind that only a newer release knows

    @property
    def version(self) -> int:
        """The version as of the last refresh, or as of the last append by this object."""
        version: int = self._table.version()
        return version

    @property
    def format(self) -> TableFormat:
        """The format of the table."""
        column = next(field for field in self._table.schema().fields if field.name == COLUMN)
        return TableFormat.in_metadata(column.metadata)

    @property
    def newer_release(self) -> str:
        """The release that changed the table in a way that this one does not know, "" if it did not say which."""
        return self.format.release if self.format.number > OURS.number else ""

    @property
    def created_at(self) -> datetime:
        """The time of the table's creation, in UTC; the beginning of the epoch if it is unknown or the table a copy."""
        metadata = self._table.metadata()
        return datetime.fromtimestamp(0 if metadata.description == _COPY else (metadata.created_time or 0) / 1000, UTC)

    @property
    def fold_generation(self) -> int:
        """The generation of the newest fold stored in its own data file, or 0."""
        return max(map(_parse_generation, self.read_files), default=0)

    def refresh(self, seen: int = 0) -> tuple[pa.Table, frozenset[str]]:
        """Return the rows of all data files that are new since `read_files`, and the names of all data files.

        A compacted file contains old rows too. Skip folds up to generation `seen`. If a rival compacted and deleted
        files after the log was read, read the log again.
        """
        missing: list[str] = []
        for _ in range(_MAX_READS):
            self.update()
            self.format.check_readable()
            names = self._data_files()
            contents = self._contents(
                {name for name in names - self.read_files if not 0 < _parse_generation(name) <= seen}
            )
            missing = sorted(name for name, content in contents.items() if content is None)
            if not missing:
                return self._read_rows(contents), frozenset(names)
        raise StoreDamaged(self._path(missing[0]), MISSING)

    def update(self) -> None:
        """Read the log up to its newest version."""
        with self._errors():
            self._table.update_incremental()  # takes a missing log for one without news
            if self._location.is_local:  # an object in a bucket is never left half-written
                self._require_log()
                self._check_commits()
        self._num_checked = self.version

    def _check_commits(self) -> None:
        """Check the commits since the last time. Those before a checkpoint may be gone: a day later they are deleted.

        Raises: StoreDamaged.
        """
        checkpoint: int | None = None
        for version in range(self._num_checked + 1, self.version + 1):
            path = Path(self._path(commit_name(version)))
            try:
                is_empty = path.stat().st_size == 0
            except FileNotFoundError:
                if checkpoint is None:
                    checkpoint = newest_checkpoint(file.name for file in self._files.entries(LOG))
                if version > checkpoint:
                    raise StoreDamaged(str(path), MISSING) from None
            else:
                if is_empty:
                    raise StoreDamaged(str(path), EMPTY)

    def rows_at(self, version: int) -> pa.Table | None:
        """Return all rows as of an older version, or None if its log or its data files were deleted."""
        uri, options = self._location.delta_uri, self._location.storage_options
        try:
            older = DeltaTable(uri, version=version, storage_options=options)
        except DeltaError:
            return None
        contents = self._contents({file.rpartition("/")[2] for file in older.file_uris()})
        return None if None in contents.values() else self._read_rows(contents)

    def append(self, rows: pa.Table, version: int) -> bool:
        """Append the rows as `version` of the table. Return False if a rival took that version.

        Rows that were appended to a folder survive a power failure.
        """
        if self.version != version - 1:  # another thread of this process took it
            return False
        with self._errors():
            if not self._is_current():
                return False
            if self._location.is_local:
                added = self._write(rows, "part", is_change=True)
                is_ours = self._commit([added])
                if not is_ours:
                    self._files.delete([added.path])
            else:
                is_ours = self._append_to_bucket(rows)
        if not is_ours:
            logger.info("version %d was taken by another writer", version)
        return is_ours

    def fold(self, parts: Iterable[pa.Table], generation: int, covered: Collection[str]) -> None:
        """Replace the data files `covered`, which hold rows up to `generation`, by the rows of one fold.

        The new files become part of the table only with the commit. A concurrent append is kept. Where a rival replaced
        one of `covered` meanwhile, its files remain and these are deleted.
        """
        with self._errors():
            while not self._is_current():
                self.update()
            added: list[AddAction] = []
            try:
                for part in parts:
                    added.append(self._write(part, f"fold-{generation:020}"))
            except BaseException:  # most likely a full disk, which a later fold would fill further
                self._files.delete([action.path for action in added])
                raise
            if self._replace(covered, added):
                self._clean_log()
            else:
                logger.info("generation %d was not folded; a later commit will fold", generation)

    def compact(self) -> None:
        """Merge small data files and delete expired log files. Leave files that a rival replaces meanwhile."""
        try:
            with self._errors():
                self.update()  # otherwise files that were replaced meanwhile would be merged again
                self.format.check_writable()
                for names in self._small_files():
                    contents = [content for content in self._contents(names).values() if content is not None]
                    if len(contents) < len(names):
                        return
                    added = self._write(all_columns_in(contents, pa.schema(self._table.schema().to_arrow())), "part")
                    self._replace(names, [added])
                self._clean_log()
        except StoreUnavailable as exc:  # committed data is not affected
            logger.warning("cannot compact the catalogue now; a later commit will: %s", exc.cause)

    def vacuum(self, before: datetime) -> None:
        """Delete files written before this time, except the log and the data files of the newest version.

        A process that paused for longer between writing a data file and committing it would commit a deleted file.
        """
        found = self._files.entries()  # list before the refresh, so that files committed meanwhile are kept
        self.update()
        self.compact()
        names = self._data_files()
        stale = [file.name for file in found if file.written_at < before and file.name not in names]
        self._files.delete([name for name in stale if not _LOG_FILE.fullmatch(name)])

    def _commit(self, added: Sequence[AddAction], removed: Collection[str] = ()) -> bool:
        """Commit as the version after this object's. Return False if a rival took that version."""
        if self._location.is_local:
            is_ours = create_file(Path(self._path(commit_name(self.version + 1))), make_commit(added, removed))
        else:
            is_ours = self._commit_to_bucket(added, removed)
        if is_ours:
            self.update()  # deltalake 1.6 does not update its own state after such a commit
        return is_ours

    def _commit_to_bucket(self, added: Sequence[AddAction], removed: Collection[str]) -> bool:
        now_ms = int(time.time() * 1000)
        actions = [*added, *(RemoveAction(name, False, now_ms, partition_values={}) for name in removed)]
        schema = self._table.schema()
        try:
            self._table.create_write_transaction(
                actions, "append", schema, commit_properties=_ONCE, post_commithook_properties=_AFTER_COMMIT
            )
        except CommitFailedError:
            return False
        return True

    def _append_to_bucket(self, rows: pa.Table) -> bool:
        """Append as `_commit` would, with three requests less, since `deltalake` updates its own state here."""
        try:
            write_deltalake(
                self._table,
                rows,
                mode="append",
                schema_mode="merge",  # columns that only a newer release knows are null
                writer_properties=_WRITER,
                commit_properties=_ONCE,
                post_commithook_properties=_AFTER_COMMIT,
            )
        except CommitFailedError:
            return False
        return True

    def _replace(self, covered: Collection[str], added: Sequence[AddAction]) -> bool:
        """Replace the data files `covered` by those in `added`, with one commit.

        If rivals take every attempt, or replace a file of `covered`, delete those in `added` and return False.
        """
        names = {action.path for action in added}
        for attempt in range(_MAX_COMMITS + 1):
            self.update()
            current = self._data_files()
            if not names.isdisjoint(current):  # an attempt whose answer was lost committed all of them
                return True
            stale = sorted(current.intersection(covered))
            if attempt == _MAX_COMMITS or len(stale) < len(covered):
                break
            if self._commit(added, stale):
                return True
        self._files.delete(names)
        return False

    def _clean_log(self) -> None:
        """Write a checkpoint, and delete log files that are older than it and expired."""
        self._table.create_checkpoint()
        self._files.flush([checkpoint_name(self.version), LAST_CHECKPOINT])
        self._table.cleanup_metadata()

    def _contents(self, names: Collection[str]) -> dict[str, bytes | None]:
        """Return the bytes of these data files; None for a missing one."""
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            return dict(zip(names, pool.map(self._files.read, names), strict=True))

    def _read_rows(self, contents: Mapping[str, bytes | None]) -> pa.Table:
        """Return the rows of these data files. Columns that an earlier version did not write are null."""
        tables = [SCHEMA.empty_table()]
        for name, content in contents.items():
            try:
                rows, has_unknown = rows_in(content or b"")
            except (OSError, pa.ArrowException) as exc:
                raise StoreDamaged(self._path(name), f"cannot be read: {short_cause(exc)}") from exc
            self.has_unknown |= has_unknown
            tables.append(rows)
        return pa.concat_tables(tables)

    def _small_files(self) -> Iterator[list[str]]:
        """Yield groups of data files that together are about as large as a file that is not rewritten again."""
        actions = pa.table(self._table.get_add_actions(flatten=True)).select(["path", "size_bytes"]).to_pylist()
        group: list[str] = []
        num_bytes = 0
        for action in actions:
            if action["size_bytes"] >= _FILE_BYTES:
                continue
            group.append(action["path"])
            num_bytes += action["size_bytes"]
            if num_bytes >= _FILE_BYTES:
                yield group
                group, num_bytes = [], 0
        if len(group) > 1:
            yield group

    def _is_current(self) -> bool:
        """Return whether the table has every column of SCHEMA and at least our format. If not, change it.

        Raises: StoreIsNewer if this release must not write to the table.
        """
        self.format.check_writable()
        known = {field.name for field in self._table.schema().fields}
        lacking = [DeltaField.from_arrow(field) for field in SCHEMA if field.name not in known]
        is_current = not lacking and self.format.number >= OURS.number
        before = self.version
        try:
            if lacking:
                logger.info("adding columns to the catalogue: %s", ", ".join(field.name for field in lacking))
                self._table.alter.add_columns(lacking)
            if self.format.number < OURS.number:
                logger.info("the catalogue gets the format %d", OURS.number)
                self._table.alter.set_column_metadata(COLUMN, {KEY: OURS.to_json()})
        except CommitFailedError:  # a rival committed first; the caller looks again
            return False
        self._files.flush([commit_name(version) for version in range(before + 1, self.version + 1)])
        return is_current

    def _write(self, rows: pa.Table, prefix: str, *, is_change: bool = False) -> AddAction:
        """Write a data file with these rows. It becomes part of the table when the returned action is committed.

        Raises: StoreDamaged if the folder of the log is gone.
        """
        if self._location.is_local:
            self._require_log()
        return write_rows(self._files, rows, prefix, is_change=is_change)

    def _require_log(self) -> None:
        """Raises: StoreDamaged if the folder of the log is gone, for example because its volume is not mounted."""
        if not Path(self._path(LOG)).is_dir():
            raise StoreDamaged(self._path(LOG), MISSING)

    def _data_files(self) -> set[str]:
        with self._errors():
            return {uri.rpartition("/")[2] for uri in self._table.file_uris()}

    def _path(self, name: str) -> str:
        return f"{self._location.delta_uri}/{name}"

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of the disk or the endpoint into StoreUnavailable, and those of damaged files into StoreDamaged.

        `deltalake` names no file, so the log is read again to find it, and once more, since a rival may change the log
        while it is read.
        """
        with store_errors():
            try:
                yield
            except (CommitFailedError, TableNotFoundError):
                raise
            except DeltaError:
                damaged = read_log(self._files).damaged
                again = read_log(self._files).damaged if damaged else {}
                if both := damaged.keys() & again.keys():
                    name = min(both)
                    raise StoreDamaged(self._path(name), again[name]) from None
                raise


def create_table(location: Location, columns: pa.Schema = SCHEMA, *, is_copy: bool = False) -> None:
    """Create the table with these columns, unless another process creates it at the same moment.

    `is_copy`: its blobs were written before it. Raises: StoreUnavailable.
    """
    uri, options = location.delta_uri, location.storage_options
    column = columns.field(COLUMN).with_metadata({KEY: OURS.to_json()})
    schema = columns.set(columns.get_field_index(COLUMN), column)
    with store_errors():
        if location.is_local:  # deltalake writes with the process's umask, so a private folder keeps others out
            make_private_folder(Path(uri, LOG))
        try:
            DeltaTable.create(
                uri,
                schema,
                mode="ignore",
                description=_COPY if is_copy else None,
                configuration=_PROPERTIES,
                storage_options=options,
            )
        except DeltaError:
            DeltaTable(uri, storage_options=options)  # another process created it
    Files(location).flush([commit_name(0)])


def _parse_generation(name: str) -> int:
    """Return the generation of a fold from the name of its data file, or 0 for another file."""
    match = _FOLD_FILE.match(name)
    return int(match[1]) if match else 0
