"""The number of events since the newest fold, and the ids of recent commits."""

from __future__ import annotations

from itertools import islice

import pyarrow as pa

from lora_store.events import commits_of, event_counts, fold_generation

_REMEMBERED = 256  # commits; a caller repeats a lost call within seconds


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
        self.commits |= commits_of(rows)
        num_old = len(self.commits) - _REMEMBERED
        for commit in list(islice(self.commits, max(num_old, 0))):
            del self.commits[commit]

    def forget_until(self, generation: int) -> None:
        """Forget the events up to this generation, which a fold replaced."""
        if self._counts and generation >= min(self._counts):
            self._counts = {at: count for at, count in self._counts.items() if at > generation}
