"""What the events since the newest fold are worth: how many there are, and which commits they came with."""

from __future__ import annotations

from itertools import islice

import pyarrow as pa

from lora_store.events import commits_of, event_counts, fold_generation

_REMEMBERED = 256  # commits: the answer to one is asked for again within seconds


class History:
    """Numbers of events and ids of commits by generation. For one thread at a time."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.commits: dict[str, int] = {}  # the newest ones, oldest first

    @property
    def num_events(self) -> int:
        """Events that are not part of a fold, and read one by one when the catalogue is opened."""
        return sum(self._counts.values())

    def saw(self, rows: pa.Table, after: int) -> None:
        """Note the rows above generation `after`."""
        self._counts |= event_counts(rows, after)
        self.folded(fold_generation(rows))
        self.commits |= commits_of(rows)
        num_old = len(self.commits) - _REMEMBERED
        for commit in list(islice(self.commits, max(num_old, 0))):
            del self.commits[commit]

    def folded(self, generation: int) -> None:
        """Forget the events up to that generation, which a fold replaced."""
        if self._counts and generation >= min(self._counts):
            self._counts = {at: count for at, count in self._counts.items() if at > generation}
