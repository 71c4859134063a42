"""The durable catalogue: a table of append-only events, and the snapshot they fold into."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime

from lora_store.errors import VersionConflict
from lora_store.event_table import EventTable
from lora_store.events import Event, events_of, table_of
from lora_store.location import Location
from lora_store.snapshot import Snapshot

_MAX_ATTEMPTS = 200  # of eight writers that never rest, each comes first about one time in eight
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.1


class Catalogue:
    """The table in `location`, created when absent. Safe to share between threads and processes.

    Delta takes two stale appends, so the rule a writer checked could be broken by a rival. Here each commit is tried
    at one version only and refused when a rival took it; the writer then sees the rival's events and checks again.
    Raises: StoreUnavailable.
    """

    def __init__(
        self,
        location: Location,
        sleep: Callable[[float], object] = time.sleep,
        max_attempts: int = _MAX_ATTEMPTS,
    ) -> None:
        self._sleep, self._max_attempts = sleep, max_attempts
        self._reading, self._writing = threading.Lock(), threading.RLock()
        self._location, self._table = location, EventTable(location)
        self._snapshot = Snapshot(0, {})
        self.snapshot()

    def snapshot(self) -> Snapshot:
        """The newest state; the same object while nothing was committed."""
        with self._reading:
            seen, (rows, files) = self._snapshot.generation, self._table.refresh()
            if self._table.version != seen:
                self._snapshot = self._snapshot.after(events_of(rows, after=seen), self._table.version)
            self._table.taken(files)  # not before the fold: what it cannot read must not be passed over
            return self._snapshot

    def snapshot_at(self, generation: int) -> Snapshot:
        """The state as of `generation`, which is not above the newest; an older one is folded anew."""
        newest = self.snapshot()
        if generation == newest.generation:
            return newest
        rows, _ = EventTable(self._location).refresh()
        return Snapshot(0, {}).after(events_of(rows, after=0, until=generation), generation)

    def commit(self, events: Callable[[Snapshot], Sequence[Event]]) -> int:
        """The generation at which what `events` returns for the newest snapshot is visible: all of it or nothing.

        `events` checks the caller's rule and may raise; it is asked again each time a rival commits first, so it must
        not have effects of its own. An empty sequence commits nothing and gives the current generation.
        Raises: VersionConflict when rivals came first every time (retry later).
        """
        for attempt in range(self._max_attempts):
            with self._writing:  # threads of one process take turns, so that rivals are other processes only
                snapshot = self.snapshot()
                wanted = events(snapshot)
                if not wanted:
                    return snapshot.generation
                generation = snapshot.generation + 1
                with self._reading:
                    if self._table.append(table_of(wanted, generation), generation):
                        return generation
            self._sleep(random.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt)))
        raise VersionConflict(self._max_attempts)

    def tidy(self, before: datetime) -> None:
        """What the table does not need is gone, as far as it was written before then."""
        with self._reading:
            self._table.tidy(before)
