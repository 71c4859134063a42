"""The durable catalogue: a table of append-only events, and the snapshot they fold into."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from uuid import uuid4

import pyarrow as pa

from lora_store.errors import GenerationGone, StoreUnavailable, VersionConflict
from lora_store.event_table import COMPACT_EVERY, EventTable
from lora_store.events import Event, dated_events_of, fold_generation, fold_table_of, table_of
from lora_store.history import History
from lora_store.location import Location
from lora_store.snapshot import Snapshot

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 200  # of eight writers that never rest, each comes first about one time in eight
_MIN_TAIL = 4096  # events since a fold, which take a quarter of a second to read
_FOLD_ROWS = 10_000  # of one data file
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.1


class Catalogue:
    """The table in `location`, created when absent. Safe to share between threads and processes.

    Delta takes two stale appends, so the rule a writer checked could be broken by a rival. Here each commit is tried
    at one version only and refused when a rival took it; the writer then sees the rival's events and checks again.

    Opening costs what is live, not what ever happened: once there are more events than live names, and more than
    `min_tail`, the writer that comes past that replaces them by a fold, which is the state they led to.
    Raises: StoreUnavailable.
    """

    def __init__(
        self,
        location: Location,
        sleep: Callable[[float], object] = time.sleep,
        max_attempts: int = _MAX_ATTEMPTS,
        min_tail: int = _MIN_TAIL,
        open_table: Callable[[Location], EventTable] = EventTable,
    ) -> None:
        self._sleep, self._max_attempts, self._min_tail = sleep, max_attempts, min_tail
        self._open_table = open_table
        self._reading, self._writing, self._tending = threading.Lock(), threading.RLock(), threading.Lock()
        self._location, self._table = location, open_table(location)
        self._appends: EventTable | None = None  # of its own: no reader waits for a write
        self._snapshot = Snapshot(0, {})
        self._history = History()
        self.snapshot()

    def snapshot(self) -> Snapshot:
        """Return the newest state; the same object while nothing was committed."""
        with self._reading:
            return self._refreshed()

    def snapshot_at(self, generation: int) -> Snapshot:
        """Return the state as of `generation`, which is not above the newest; an older one is folded anew.

        Raises: GenerationGone when neither the events since nor the files of that time are there any more.
        """
        newest = self.snapshot()
        if generation == newest.generation:
            return newest
        table = self._open_table(self._location)
        rows: pa.Table | None = table.refresh()[0]
        if generation < fold_generation(rows):
            rows = table.rows_at(generation)
        if rows is None:
            raise GenerationGone(generation, newest.generation)
        return Snapshot(0, {}).after_dated(dated_events_of(rows, after=0, until=generation), generation)

    def commit(self, events: Callable[[Snapshot], Sequence[Event]], commit_id: str | None = None) -> int:
        """Commit what `events` returns for the newest snapshot, all of it or nothing. Return its generation.

        `events` checks the caller's rule and may raise; it is asked again each time a rival commits first, so it must
        not have effects of its own. An empty sequence commits nothing and gives the current generation.
        `commit_id`: a call whose id was committed before gives that generation, and `events` is not asked. So a commit
        whose answer was lost is not taken for a rival's, and a caller may repeat a call that broke off.
        Raises: VersionConflict when rivals came first every time (retry later).
        """
        commit_id = commit_id or uuid4().hex
        for attempt in range(self._max_attempts):
            with self._writing:  # threads of one process take turns, so that rivals are other processes only
                snapshot, known = self._newest(commit_id)
                if known is not None:
                    return known
                wanted = events(snapshot)
                if not wanted:
                    return snapshot.generation
                generation = snapshot.generation + 1
                is_ours = self._append(table_of(wanted, generation, commit_id), generation, commit_id)
            if is_ours:
                self._tend(generation, len(wanted))
                return generation
            self._sleep(random.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt)))
        _, known = self._newest(commit_id)
        if known is not None:
            return known
        raise VersionConflict(self._max_attempts)

    def vacuum(self, before: datetime) -> None:
        """Remove what the table does not need, as far as it was written before then.

        Events that were overtaken are folded away first: no embedding of a version that is not kept is left.
        """
        with self._tending:
            if self._history.num_events:
                self._fold()
            self._open_table(self._location).vacuum(before)

    def _refreshed(self) -> Snapshot:
        """The newest state. To be called under the lock of the readers."""
        seen = self._snapshot.generation
        rows, files = self._table.refresh(seen)
        if self._table.version != seen:
            self._snapshot = self._snapshot.after_dated(dated_events_of(rows, after=seen), self._table.version)
            self._history.saw(rows, after=seen)
        self._table.taken(files)  # not before the fold: what it cannot read must not be passed over
        self._history.folded(self._table.fold_generation)
        return self._snapshot

    def _newest(self, commit_id: str) -> tuple[Snapshot, int | None]:
        """The newest state, and the generation of the commit where it is part of that."""
        with self._reading:
            return self._refreshed(), self._history.commits.get(commit_id)

    def _append(self, rows: pa.Table, generation: int, commit_id: str) -> bool:
        """Whether the rows are that generation. Where no answer came, the table says whether they are."""
        if self._appends is None:
            self._appends = self._open_table(self._location)
        try:
            if self._appends.version != generation - 1:
                self._appends.follow()
            return self._appends.append(rows, generation)
        except StoreUnavailable:
            _, known = self._newest(commit_id)
            if known is None:
                raise
            logger.warning("the answer to the commit of generation %d was lost; it is there", generation)
            return known == generation

    def _tend(self, generation: int, num_new: int) -> None:
        """Keep the table small, one thread at a time and beside readers and writers. What fails is left to later."""
        if not self._tending.acquire(blocking=False):
            return
        try:
            if self._history.num_events + num_new > max(self._min_tail, len(self._snapshot.records)):
                self._fold()
            elif generation % COMPACT_EVERY == 0:
                self._open_table(self._location).compact()
        except StoreUnavailable as exc:
            logger.warning("folding the catalogue is left to a later commit: %s", exc.cause)
        finally:
            self._tending.release()

    def _fold(self) -> None:
        """Replace all events so far by what they left."""
        with self._reading:
            snapshot, covered, commits = self._refreshed(), self._table.read_files, dict(self._history.commits)
        events, table = list(snapshot.folded()), self._open_table(self._location)
        starts = range(0, len(events), _FOLD_ROWS)
        parts = (
            fold_table_of(events[start : start + _FOLD_ROWS], snapshot.generation, {} if start else commits, start)
            for start in starts
        )
        table.fold(parts, snapshot.generation, covered)
