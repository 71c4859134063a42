"""The durable catalogue: a table of append-only events, and the snapshot that results from them."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from operator import itemgetter
from uuid import uuid4

import pyarrow as pa

from lora_store.errors import (
    GenerationGone,
    LoraStoreError,
    StoreDamaged,
    StoreFull,
    StoreIsNewer,
    StoreUnavailable,
    VersionConflict,
)
from lora_store.event_table import COMPACT_EVERY, EventTable, create_table
from lora_store.events import (
    FOLD_PART_ROWS,
    Event,
    event_counts,
    fold_generation,
    make_fold_table,
    make_table,
    read_commits,
    read_dated_events,
)
from lora_store.location import Location
from lora_store.snapshot import Snapshot
from lora_store.table_log import LOG, MISSING

logger = logging.getLogger(__name__)

CATALOGUE = "catalogue"  # the folder of the table below the store's location
_MAX_ATTEMPTS = 200  # with eight busy writers, each wins about one attempt in eight
_MIN_TAIL = 4096  # events since a fold; reading so many takes a quarter of a second
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.1
_REMEMBERED = 256  # commits; a caller repeats a lost call within seconds


class Catalogue:
    """The table in `location`, created if absent. Safe to share between threads and processes.

    Delta accepts two concurrent appends, so a rival could break the rule that a writer checked. Each commit is
    therefore tried at one version only and fails if a rival took that version; the writer then reads the rival's events
    and checks its rule again.

    The cost of opening depends on the number of live adapters, not on the length of the history: when there are more
    events than live names, and more than `min_tail`, the next writer replaces the events by a fold, which holds the
    resulting state. Raises: StoreUnavailable; StoreDamaged; StoreIsNewer for what only a newer release may do.
    """

    def __init__(
        self,
        location: Location,
        sleep: Callable[[float], object] = time.sleep,
        max_attempts: int = _MAX_ATTEMPTS,
        min_tail: int = _MIN_TAIL,
        open_table: Callable[[Location], EventTable] = EventTable,
        before_creating: Callable[[], object] = lambda: None,
    ) -> None:
        """Open the catalogue. `before_creating` is called where there is none, and raises if there must be one."""
        self._sleep, self._max_attempts, self._min_tail = sleep, max_attempts, min_tail
        self._open_table = open_table
        self._reading, self._writing, self._maintaining = threading.Lock(), threading.RLock(), threading.Lock()
        self._location = location
        self.is_new = False  # whether this object created the catalogue
        try:
            self._table = open_table(location)
        except StoreDamaged as exc:
            if exc.problem != MISSING or not exc.file.endswith(LOG):
                raise
            self.is_new = self._create(before_creating)
            self._table = open_table(location)
        self._appends: EventTable | None = None  # a second table object, so that no reader waits for a write
        self._snapshot = Snapshot(0, {})
        self._history = History()
        self.snapshot()

    @property
    def created_at(self) -> datetime:
        """The time of the catalogue's creation, in UTC."""
        return self._table.created_at

    def check_known(self, wanted: str) -> None:
        """Check that this release may write, and knows everything that was written. `wanted`: what depends on it.

        Raises: StoreIsNewer.
        """
        with self._reading:
            self._refreshed()
            self._table.format.check_writable()
            if self._table.has_unknown:
                raise StoreIsNewer(wanted, self._table.newer_release)

    def snapshot(self) -> Snapshot:
        """Return the newest state. Return the same object until something is committed."""
        with self._reading:
            return self._refreshed()

    def snapshot_at(self, generation: int) -> Snapshot:
        """Return the state as of `generation`, which must not exceed the newest; replay the events for an older one.

        Raises: GenerationGone when the events up to that generation are no longer stored.
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
        return Snapshot(0, {}).after_dated(read_dated_events(rows, after=0, until=generation), generation)

    def commit(
        self,
        events: Callable[[Snapshot], Sequence[Event]],
        commit_id: str | None = None,
        *,
        tenant: str | None = None,
    ) -> int:
        """Commit the events that `events` returns for the newest snapshot, all or none. Return their generation.

        `events` checks the caller's rule and may raise. It is called again each time a rival commits first, so it must
        have no side effects. If it returns nothing, nothing is committed, and the generation of the newest change that
        `tenant` can see is returned; None: of the newest change.
        `commit_id` makes a call idempotent: if a commit with this id exists, return its generation without calling
        `events`. A commit whose answer was lost is thus not mistaken for a rival's, and a caller may repeat a failed
        call. Raises: VersionConflict when a rival won every attempt (retry later).
        """
        commit_id = commit_id or uuid4().hex
        for attempt in range(self._max_attempts):
            with self._writing:  # threads of one process take turns, so only other processes are rivals
                snapshot, known = self._newest(commit_id)
                if known is not None:
                    return known
                wanted = events(snapshot)
                if not wanted:
                    return snapshot.generation if tenant is None else snapshot.generation_for(tenant)
                generation = snapshot.generation + 1
                is_ours = self._append(make_table(wanted, generation, commit_id), generation, commit_id)
            if is_ours:
                self._maintain(generation, len(wanted))
                return generation
            self._sleep(random.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt)))
        _, known = self._newest(commit_id)
        if known is not None:
            return known
        raise VersionConflict(self._max_attempts)

    def vacuum(self, before: datetime) -> None:
        """Delete files that the table no longer needs and that were written before this time.

        Fold first, so that no embedding of a version that is no longer kept remains; on a full disk, which may have no
        room for that, a later call folds. Raises: StoreIsNewer if a fold would lose what only a newer release knows.
        """
        self.check_known("fold the catalogue")
        with self._maintaining:
            if self._history.num_events:
                try:
                    self._fold()
                except StoreFull as exc:
                    logger.warning("cannot fold the catalogue; the next collection of garbage will: %s", exc)
            self._open_table(self._location).vacuum(before)

    def _create(self, before_creating: Callable[[], object]) -> bool:
        """Create the table. Return False if another process created it, and perhaps published, a moment ago."""
        try:
            before_creating()
        except StoreDamaged as refused:
            try:
                self._open_table(self._location)
            except StoreDamaged:
                raise refused from None
            return False
        create_table(self._location)
        return True

    def _refreshed(self) -> Snapshot:
        """Return the newest state. The caller holds `_reading`."""
        seen = self._snapshot.generation
        rows, files = self._table.refresh(seen)
        if self._table.version != seen:
            self._snapshot = self._snapshot.after_dated(read_dated_events(rows, after=seen), self._table.version)
            self._history.add(rows, after=seen)
        self._table.read_files = files  # only now: rows that could not be applied must be read again
        self._history.forget_until(self._table.fold_generation)
        return self._snapshot

    def _newest(self, commit_id: str) -> tuple[Snapshot, int | None]:
        """Return the newest state, and the generation of this commit if it is part of that state."""
        with self._reading:
            return self._refreshed(), self._history.commits.get(commit_id)

    def _append(self, rows: pa.Table, generation: int, commit_id: str) -> bool:
        """Append the rows as `generation` and return whether it worked; if no answer came, look it up in the table."""
        if self._appends is None:
            self._appends = self._open_table(self._location)
        try:
            if self._appends.version != generation - 1:
                self._appends.update()
            return self._appends.append(rows, generation)
        except StoreUnavailable:
            _, known = self._newest(commit_id)
            if known is None:
                raise
            logger.warning("generation %d is committed, although the store's answer was lost", generation)
            return known == generation

    def _maintain(self, generation: int, num_new: int) -> None:
        """Fold or compact the table if it has grown. Block no reader or writer; leave a failure to a later commit."""
        if not self._maintaining.acquire(blocking=False):
            return
        try:
            num_events = self._history.num_events + num_new
            if num_events > max(self._min_tail, len(self._snapshot.records)) and not self._table.has_unknown:
                self._fold()
            elif generation % COMPACT_EVERY == 0:
                self._open_table(self._location).compact()
        except LoraStoreError as exc:
            logger.warning("cannot fold the catalogue now; a later commit will: %s", exc)
        finally:
            self._maintaining.release()

    def _fold(self) -> None:
        """Replace all events so far by the state that they led to."""
        with self._reading:
            snapshot, covered, commits = self._refreshed(), self._table.read_files, dict(self._history.commits)
            if self._table.has_unknown:
                raise StoreIsNewer("fold the catalogue", self._table.newer_release)
        events, table = list(snapshot.folded()), self._open_table(self._location)
        parts = (
            make_fold_table(events, snapshot.generation, {} if start else commits, slice(start, start + FOLD_PART_ROWS))
            for start in range(0, len(events), FOLD_PART_ROWS)
        )
        table.fold(parts, snapshot.generation, covered)


class History:
    """Event counts and commit ids by generation. Use it from one thread at a time."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.commits: dict[str, int] = {}  # the newest ones, oldest first

    @property
    def num_events(self) -> int:
        """The number of events outside folds, each of which is replayed when the catalogue is opened."""
        return sum(self._counts.values())

    def add(self, rows: pa.Table, after: int) -> None:
        """Count the rows above generation `after` and remember their commits."""
        self._counts |= event_counts(rows, after)
        self.forget_until(fold_generation(rows))
        known = self.commits | read_commits(rows)  # a compacted file has older commits too
        self.commits = dict(sorted(known.items(), key=itemgetter(1))[-_REMEMBERED:])

    def forget_until(self, generation: int) -> None:
        """Forget the events up to this generation, which a fold replaced."""
        if self._counts and generation >= min(self._counts):
            self._counts = {at: count for at, count in self._counts.items() if at > generation}
