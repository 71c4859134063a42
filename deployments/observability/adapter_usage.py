"""Which adapters a Retriever replica chooses lately, which it never does, and which never come first."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from lora_store import AdapterRef

_WINDOW_S = 1800.0
_MIN_TIMES_SEEN = 20  # before one that never came first is called shadowed


class RecentChoices:
    """How often each adapter was chosen in this window of time and the one before: the last half hour to an hour."""

    def __init__(self, window_s: float = _WINDOW_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._window_s, self._clock = window_s, clock
        self._began = clock()
        self._now: Counter[AdapterRef] = Counter()
        self._before: Counter[AdapterRef] = Counter()

    def add(self, refs: Sequence[AdapterRef]) -> None:
        self._turn()
        self._now.update(refs)

    def largest(self, num_wanted: int) -> tuple[list[tuple[AdapterRef, int]], int]:
        """(the adapters chosen most often, with their counts; how often all others were chosen)."""
        self._turn()
        both = self._now + self._before
        most = both.most_common(num_wanted)
        return most, both.total() - sum(count for _, count in most)

    def _turn(self) -> None:
        passed = self._clock() - self._began
        if passed < self._window_s:
            return
        self._before = self._now if passed < 2 * self._window_s else Counter()
        self._now = Counter()
        self._began = self._clock()


class RoutingTotals:
    """What became of every adapter since this replica started; what is no longer live is forgotten."""

    def __init__(self) -> None:
        self._chosen: set[AdapterRef] = set()
        self._times_seen: Counter[AdapterRef] = Counter()
        self._came_first: set[AdapterRef] = set()

    def saw(self, candidates: Sequence[AdapterRef], chosen: Collection[AdapterRef]) -> None:
        """One prompt's candidates, best first, and those of its plan."""
        self._chosen.update(chosen)
        self._times_seen.update(candidates)
        self._came_first.update(candidates[:1])

    def keep(self, is_live: Callable[[AdapterRef], bool]) -> None:
        """Forget all others."""
        self._chosen = set(filter(is_live, self._chosen))
        self._came_first = set(filter(is_live, self._came_first))
        self._times_seen = Counter({ref: times for ref, times in self._times_seen.items() if is_live(ref)})

    @property
    def num_chosen(self) -> int:
        """Adapters that were in at least one plan."""
        return len(self._chosen)

    @property
    def num_shadowed(self) -> int:
        """Adapters that were often among the candidates, each time behind another."""
        seen = self._times_seen.items()
        return sum(times >= _MIN_TIMES_SEEN and ref not in self._came_first for ref, times in seen)
