"""The durable catalogue: a Delta table of append-only events, and the snapshot they fold into."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from lora_store.blobs import locate
from lora_store.errors import AdapterNotFound, VersionConflict
from lora_store.records import SCHEMA, AdapterRecord, record_from_row, row_of

__all__ = ["AdapterRecord", "Catalogue", "Event", "Snapshot"]

logger = logging.getLogger(__name__)

EventKind = Literal["publish"]
Key = tuple[str, str]
_MAX_ATTEMPTS = 20
_COMPACT_AT_FILES = 100  # every commit adds a file; this many become one (delta-rs checkpoints the log itself)


@dataclass(frozen=True, slots=True)
class Event:
    """One row of the table. The record's generation is set by the commit that writes it."""

    kind: EventKind
    record: AdapterRecord


@dataclass(frozen=True)
class Snapshot:
    """Every live adapter by (tenant, name), as of one generation. Never changes."""

    generation: int
    records: Mapping[Key, AdapterRecord]

    def __post_init__(self) -> None:
        object.__setattr__(self, "records", MappingProxyType(dict(self.records)))

    def __reduce__(self) -> tuple[type[Snapshot], tuple[int, dict[Key, AdapterRecord]]]:
        return Snapshot, (self.generation, dict(self.records))  # a mapping proxy cannot be pickled

    @cached_property
    def public(self) -> Mapping[str, AdapterRecord]:
        """The public adapters by bare name: a bare name has one owner."""
        return {record.ref.name: record for record in self.records.values() if record.visibility == "public"}

    def resolve(self, tenant: str, name: str) -> AdapterRecord:
        """The adapter `tenant` means by `name`: its own, else the public one; `owner/name` means the owner's alone.

        Raises: AdapterNotFound, also for what exists but `tenant` may not see.
        """
        owner, slash, bare = name.rpartition("/")
        found = self.records.get((owner, bare) if slash else (tenant, name))
        if found is None:
            found = self.public.get(name)  # never a name with a slash
        if found is None or not found.is_visible_to(tenant):
            raise AdapterNotFound(name)
        return found

    def visible_to(self, tenant: str) -> list[AdapterRecord]:
        """What `tenant` may use, sorted by owner and name."""
        return [record for _, record in sorted(self.records.items()) if record.is_visible_to(tenant)]


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
        rows = [row_of(e.kind, replace(e.record, generation=generation), n) for n, e in enumerate(events)]
        with self._lock:
            if self._table.version() != seen.generation:  # another thread of this process went past it
                return False
            try:
                write_deltalake(
                    self._table,
                    pa.Table.from_pylist(rows, schema=SCHEMA),
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
        records = dict(self._snapshot.records)
        for row in self._rows_of(names - self._read):
            if row["generation"] > seen:  # a compacted file holds rows that were folded before
                _FOLD[row["event"]](records, record_from_row(row))
        self._snapshot, self._read = Snapshot(version, records), names

    def _rows_of(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """The rows of these files in the order they were written."""
        tables = []
        for name in names:
            with self._files.open_input_file(f"{self._root}/{name}") as file:
                tables.append(pq.read_table(file, schema=SCHEMA))
        rows: list[dict[str, Any]] = [row for table in tables for row in table.to_pylist()]
        return sorted(rows, key=lambda row: (row["generation"], row["row"]))


def _open_table(uri: str) -> DeltaTable:
    try:
        return DeltaTable.create(uri, schema=SCHEMA, mode="ignore")
    except DeltaError:
        return DeltaTable(uri)  # another process created it in the same moment; else this names the real trouble


def _publish(records: dict[Key, AdapterRecord], record: AdapterRecord) -> None:
    records[record.ref.tenant, record.ref.name] = record


_FOLD: dict[str, Callable[[dict[Key, AdapterRecord], AdapterRecord], None]] = {
    "publish": _publish,
}
