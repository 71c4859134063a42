"""The durable catalogue: a Delta table of append-only events, and the snapshot they fold into."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from lora_store.blobs import locate
from lora_store.errors import VersionConflict
from lora_store.events import SCHEMA, Event, events_of, table_of
from lora_store.snapshot import Snapshot

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 20
_COMPACT_AT_FILES = 100  # every commit adds a file; this many become one (delta-rs checkpoints the log itself)


class Catalogue:
    """The table under `<uri>/catalogue`, created when absent. Safe to share between threads and processes.

    Delta takes two stale appends, so the rule a writer checked could be broken by a rival. Here each commit is tried
    at one version only and refused when a rival took it; the writer then sees the rival's events and checks again.
    """

    def __init__(self, uri: str) -> None:
        self._lock = threading.Lock()
        located = f"{uri.rstrip('/')}/catalogue"
        self._table = _open_table(located)
        self._files, self._root = locate(located)
        self._read: set[str] = set()  # data files already folded in
        self._snapshot = Snapshot(0, {})
        self._fold_new_rows()

    def snapshot(self) -> Snapshot:
        """The newest state; the same object while nothing was committed."""
        with self._lock:
            self._table.update_incremental()
            self._fold_new_rows()
            return self._snapshot

    def commit(self, events: Callable[[Snapshot], Sequence[Event]]) -> int:
        """The generation at which what `events` returns for the newest snapshot is visible: all of it or nothing.

        `events` checks the caller's rule and may raise; it is asked again each time a rival commits first, so it must
        not have effects of its own. An empty sequence commits nothing and gives the current generation.
        Raises: VersionConflict when rivals came first every time (retry later).
        """
        for _ in range(_MAX_ATTEMPTS):
            snapshot = self.snapshot()
            wanted = events(snapshot)
            if not wanted:
                return snapshot.generation
            if self._append(snapshot, wanted):
                return snapshot.generation + 1
        raise VersionConflict(_MAX_ATTEMPTS)

    def _append(self, seen: Snapshot, events: Sequence[Event]) -> bool:
        """Whether the events became the commit right after `seen`."""
        generation = seen.generation + 1
        table = table_of(events, generation)
        with self._lock:
            if self._table.version() != seen.generation:  # another thread of this process went past it
                return False
            try:
                write_deltalake(
                    self._table,
                    table,
                    mode="append",
                    commit_properties=CommitProperties(max_commit_retries=0),
                )
            except CommitFailedError:
                logger.info("generation %d was taken by another writer", generation)
                return False
            self._tidy()
        return True

    def _tidy(self) -> None:
        if len(self._table.file_uris()) < _COMPACT_AT_FILES:
            return
        try:
            self._table.optimize.compact()
        except DeltaError as exc:  # mostly a rival that compacts too; the events are committed either way
            logger.warning("compaction left to a later commit: %s", exc)

    def _fold_new_rows(self) -> None:
        seen, version = self._snapshot.generation, self._table.version()
        if version == seen:
            return
        names = {uri.rpartition("/")[2] for uri in self._table.file_uris()}
        rows = self._read_rows(names - self._read)
        events = events_of(rows, after=seen)  # a compacted file holds rows that were folded before
        self._snapshot, self._read = self._snapshot.after(events, version), names

    def _read_rows(self, names: Collection[str]) -> pa.Table:
        tables = [SCHEMA.empty_table()]
        for name in names:
            with self._files.open_input_file(f"{self._root}/{name}") as file:
                tables.append(pq.read_table(file, schema=SCHEMA))
        return pa.concat_tables(tables)


def _open_table(uri: str) -> DeltaTable:
    try:
        return DeltaTable.create(uri, schema=SCHEMA, mode="ignore")
    except DeltaError:
        return DeltaTable(uri)  # another process created it in the same moment; else this names the real trouble
