"""Which adapters a Retriever replica chose recently, never chose, or never ranked first."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from lora_store import AdapterRef

_WINDOW_S = 1800.0
_MIN_TIMES_SEEN = 20  # before an adapter that never came first counts as shadowed


class RecentPlans:
    """Counts of how often each adapter was chosen in the current and the previous window: 30 to 60 minutes."""

    def __init__(self, window_s: float = _WINDOW_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._window_s, self._clock = window_s, clock
        self._began = clock()
        self._now: Counter[AdapterRef] = Counter()
        self._before: Counter[AdapterRef] = Counter()

    def add(self, refs: Sequence[AdapterRef]) -> None:
        """Count the adapters of one plan."""
        self._rotate()
        self._now.update(refs)

    def largest(self, num_wanted: int) -> tuple[list[tuple[AdapterRef, int]], int]:
        """Return the most frequent adapters with their counts, and the total count of all others."""
        self._rotate()
        both = self._now + self._before
        most = both.most_common(num_wanted)
        return most, both.total() - sum(count for _, count in most)

    def _rotate(self) -> None:
        passed = self._clock() - self._began
        if passed < self._window_s:
            return
        self._before = self._now if passed < 2 * self._window_s else Counter()
        self._now = Counter()
        self._began = self._clock()


class RoutingTotals:
    """Outcomes of all live adapters since this replica started."""

    def __init__(self) -> None:
        self._chosen: set[AdapterRef] = set()
        self._times_seen: Counter[AdapterRef] = Counter()
        self._came_first: set[AdapterRef] = set()

    def add(self, candidates: Sequence[AdapterRef], chosen: Collection[AdapterRef]) -> None:
        """Count one prompt: its candidates, best first, and the adapters of its plan."""
        self._chosen.update(chosen)
        self._times_seen.update(candidates)
        self._came_first.update(candidates[:1])

    def retain(self, is_live: Callable[[AdapterRef], bool]) -> None:
        """Forget all adapters that are not live."""
        self._chosen = set(filter(is_live, self._chosen))
        self._came_first = set(filter(is_live, self._came_first))
        self._times_seen = Counter({ref: times for ref, times in self._times_seen.items() if is_live(ref)})

    @property
    def num_chosen(self) -> int:
        """Adapters in at least one plan."""
        return len(self._chosen)

    @property
    def num_shadowed(self) -> int:
        """Adapters that were often candidates but never ranked first."""
        seen = self._times_seen.items()
        return sum(times >= _MIN_TIMES_SEEN and ref not in self._came_first for ref, times in seen)
