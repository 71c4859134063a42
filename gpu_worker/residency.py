"""Which adapters are in the bank, and where. Active adapters form the prefix of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gpu_worker.errors import PlanTooLarge
from lora_store.adapter import AdapterWeights


class RowStore(Protocol):
    """What residency moves rows in: the LoraBank, or a list in a test."""

    @property
    def num_rows(self) -> int: ...
    def write(self, rows: Sequence[int], weights: AdapterWeights) -> None: ...
    def swap(self, rows: Sequence[int], others: Sequence[int]) -> None: ...
    def free(self, rows: Sequence[int]) -> None: ...
    def set_active(self, num_rows: int) -> None: ...


class Residency:
    """Rank rows [0, active_rows) belong to pinned adapters; the rest are free or an unpinned adapter's, evictable.

    An adapter takes as many rows as its widest module has ranks; they need not be adjacent.
    """

    def __init__(self, bank: RowStore) -> None:
        self._bank = bank
        self._rows: dict[str, list[int]] = {}  # rank index -> bank row; insertion order = least recently used first
        self._owner: list[tuple[str, int] | None] = [None] * bank.num_rows
        self._pins: dict[str, int] = {}
        self.active_rows = 0

    @property
    def resident(self) -> frozenset[str]:
        """Weights digests of every adapter in the bank."""
        return frozenset(self._rows)

    @property
    def num_pins(self) -> int:
        return sum(self._pins.values())

    def rows(self, digest: str) -> list[int]:
        """Bank rows of a resident adapter, by rank index."""
        return self._rows[digest]

    def rank_indices(self) -> list[int]:
        """The rank index each active row holds."""
        return [owner[1] for owner in self._owner[: self.active_rows] if owner is not None]

    def try_pin(self, adapters: Sequence[AdapterWeights]) -> bool:
        """Pin all adapters into the active prefix, or none: False when pinned rows leave too little room.

        Raises: PlanTooLarge when they could never fit.
        """
        needed = sum(adapter.max_rank for adapter in adapters)
        if needed > self._bank.num_rows:
            raise PlanTooLarge(f"the plan's adapters take {needed} rank rows, the bank has {self._bank.num_rows}")
        wanted = {adapter.weights_digest for adapter in adapters}
        if not self._make_room(adapters, wanted):
            return False
        for adapter in adapters:
            digest = adapter.weights_digest
            if digest not in self._rows:
                self._bring_in(adapter)
            elif digest not in self._pins:
                self._activate(digest)
            self._pins[digest] = self._pins.get(digest, 0) + 1
        self._bank.set_active(self.active_rows)
        return True

    def unpin(self, digests: Sequence[str]) -> None:
        """Drop one pin of each; an adapter without pins leaves the prefix and may be evicted."""
        for digest in digests:
            self._pins[digest] -= 1
            if self._pins[digest] == 0:
                del self._pins[digest]
                self._deactivate(digest)
        self._bank.set_active(self.active_rows)

    def _make_room(self, adapters: Sequence[AdapterWeights], wanted: set[str]) -> bool:
        missing = sum(a.max_rank for a in adapters if a.weights_digest not in self._rows)
        free = self._owner.count(None)
        evictable = [digest for digest in self._rows if digest not in self._pins and digest not in wanted]
        if missing > free + sum(len(self._rows[digest]) for digest in evictable):
            return False
        for digest in evictable:
            if free >= missing:
                break
            free += len(self._rows[digest])
            self._evict(digest)
        return True

    def _evict(self, digest: str) -> None:
        rows = self._rows.pop(digest)
        for row in rows:
            self._owner[row] = None
        self._bank.free(rows)

    def _bring_in(self, adapter: AdapterWeights) -> None:
        start, end = self.active_rows, self.active_rows + adapter.max_rank
        in_the_way = [row for row in range(start, end) if self._owner[row] is not None]
        free = [row for row in range(end, len(self._owner)) if self._owner[row] is None]
        self._swap(in_the_way, free[: len(in_the_way)])
        rows = list(range(start, end))
        self._bank.write(rows, adapter)
        self._rows[adapter.weights_digest] = rows
        for index, row in enumerate(rows):
            self._owner[row] = (adapter.weights_digest, index)
        self.active_rows = end

    def _activate(self, digest: str) -> None:
        rows = set(self._rows[digest])
        target = range(self.active_rows, self.active_rows + len(rows))
        self._swap(sorted(rows.difference(target)), [row for row in target if row not in rows])
        self._rows[digest] = self._rows.pop(digest)  # most recently used
        self.active_rows = target.stop

    def _deactivate(self, digest: str) -> None:
        rows = set(self._rows[digest])
        target = range(self.active_rows - len(rows), self.active_rows)
        self._swap(sorted(rows.difference(target)), [row for row in target if row not in rows])
        self._rows[digest] = self._rows.pop(digest)
        self.active_rows = target.start

    def _swap(self, rows: Sequence[int], others: Sequence[int]) -> None:
        if not rows:
            return
        self._bank.swap(rows, others)
        for row, other in zip(rows, others, strict=True):
            self._owner[row], self._owner[other] = self._owner[other], self._owner[row]
            for position in (row, other):
                owner = self._owner[position]
                if owner is not None:
                    self._rows[owner[0]][owner[1]] = position
