"""Track which bank rows belong to which adapter, and pack those of pinned adapters where a reader needs a prefix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from gpu_worker.bank.device_layout import DeviceAdapter, DeviceModule
from gpu_worker.errors import PlanTooLarge


class AdapterStore(Protocol):
    """Storage of a number of rows that holds whole adapters, and may place their rows itself."""

    @property
    def num_rows(self) -> int: ...
    def write(self, rows: Sequence[int], adapter: DeviceAdapter) -> None: ...
    def free(self, rows: Sequence[int]) -> None: ...


class RowStore(AdapterStore, Protocol):
    """Storage whose rows Residency places: the LoraBank, or a list in tests."""

    def move(self, rows: Sequence[int], to: Sequence[int]) -> None: ...
    def swap(self, rows: Sequence[int], others: Sequence[int]) -> None: ...
    def set_active(self, num_rows: int) -> None: ...


class RowAssignment(ABC):
    """Decides which adapters occupy which rows of a bank, and which are evicted.

    Rows of adapters without pins may be evicted. An adapter needs as many rows as the rank of its widest module; they
    need not be adjacent.
    """

    def __init__(self, bank: AdapterStore, expert_bytes: int = 0) -> None:
        """`expert_bytes`: the most bytes of the experts of all adapters in the bank."""
        self._bank, self._expert_bytes = bank, expert_bytes
        self._experts: dict[str, Mapping[str, DeviceModule]] = {}  # only resident adapters that have experts
        self._rows: dict[str, list[int]] = {}  # digest -> bank row per rank index; least recently used first
        self._owner: list[tuple[str, int] | None] = [None] * bank.num_rows
        self._pins: dict[str, int] = {}
        self._unwritten: dict[str, DeviceAdapter] = {}  # have rows assigned and are written by `settle`
        self.active_rows = 0
        self.num_changes = 0  # changes of pins or residents since the start

    def __contains__(self, digest: object) -> bool:
        """Return whether the adapter is resident, pinned or not."""
        return digest in self._rows

    @property
    def resident(self) -> frozenset[str]:
        """Return the weights digests of all adapters in the bank."""
        return frozenset(self._rows)

    @property
    def num_pins(self) -> int:
        return sum(self._pins.values())

    @property
    def occupied_rows(self) -> int:
        return len(self._owner) - self._owner.count(None)

    def part_of(self, digests: Sequence[str]) -> RowAssignment:
        """Return the assignment of the rows that these adapters use: of all rows."""
        return self

    @property
    def experts(self) -> Mapping[str, Mapping[str, DeviceModule]]:
        """Return the experts of the resident adapters that have some, by digest."""
        return self._experts

    def rows(self, digest: str) -> list[int]:
        """Return the bank rows of a resident adapter, by rank index."""
        return self._rows[digest]

    def try_pin(self, digests: Sequence[str], loaded: Mapping[str, DeviceAdapter]) -> bool:
        """Bring all adapters into the bank and pin them. Return False, and change nothing, if there is no room.

        `loaded`: the adapters that are not resident. Raises: PlanTooLarge if they exceed the whole bank.
        """
        missing = {digest: loaded[digest] for digest in digests if digest not in self._rows}
        num_missing = sum(adapter.max_rank for adapter in missing.values())
        needed = num_missing + sum(len(self._rows[digest]) for digest in digests if digest not in missing)
        if needed > self._bank.num_rows:
            raise PlanTooLarge(
                f"the plan's adapters need {needed} rank rows, the bank has {self._bank.num_rows}; use fewer adapters"
            )
        num_bytes = sum(adapter.expert_bytes for adapter in missing.values())
        if num_bytes and num_bytes + sum(map(self._count_bytes, digests)) > self._expert_bytes:
            raise PlanTooLarge(
                f"the plan's adapters need {num_bytes + sum(map(self._count_bytes, digests))} bytes for their experts,"
                f" of {self._expert_bytes} (worker.host_cache_bytes); use fewer adapters"
            )
        vacated = self._make_room(num_missing, num_bytes, digests)
        if vacated is None:
            return False
        for digest in digests:
            if digest not in self._pins:
                self._rows[digest] = self._bring_in(missing[digest]) if digest in missing else self._rows.pop(digest)
            self._pins[digest] = self._pins.get(digest, 0) + 1
        for rows in vacated:
            self._free_vacated(rows)
        self.num_changes += 1
        return True

    def unpin(self, digests: Sequence[str]) -> None:
        """Drop one pin of each adapter. Adapters without pins may be evicted."""
        self.num_changes += 1
        for digest in digests:
            self._pins[digest] -= 1
            if self._pins[digest] == 0:
                del self._pins[digest]
                self._rows[digest] = self._rows.pop(digest)  # most recently used

    def evict(self, digest: str) -> None:
        """Free the rows of a resident adapter without pins."""
        assert digest not in self._pins, "a pinned adapter cannot be evicted"
        self.num_changes += 1
        self._bank.free(self._vacate(digest))

    def drop(self, digests: Collection[str]) -> None:
        """Free the rows of those of these adapters that are resident. None may be pinned."""
        for digest in digests:
            if digest in self._rows:
                self.evict(digest)

    def _make_room(self, num_missing: int, num_bytes: int, wanted: Sequence[str]) -> list[list[int]] | None:
        """Let adapters leave until there is room. Return the rows of each, still to be freed, or None without room.

        `num_bytes`: of the experts of the adapters that come.
        """
        free, free_bytes = self._owner.count(None), self._expert_bytes - sum(map(self._count_bytes, self._experts))
        evictable = [digest for digest in self._rows if digest not in self._pins and digest not in wanted]
        if num_missing > free + sum(len(self._rows[digest]) for digest in evictable):
            return None
        if num_bytes > free_bytes + sum(map(self._count_bytes, evictable)):
            return None
        vacated: list[list[int]] = []
        for digest in evictable:
            if free >= num_missing and free_bytes >= num_bytes:
                break
            free, free_bytes = free + len(self._rows[digest]), free_bytes + self._count_bytes(digest)
            vacated.append(self._vacate(digest))
        return vacated

    def _count_bytes(self, digest: str) -> int:
        """Return the bytes of the experts of a resident adapter, 0 of another."""
        return sum(module.num_bytes for module in self._experts.get(digest, {}).values())

    def _vacate(self, digest: str) -> list[int]:
        """Take the adapter's rows from it and return them."""
        rows = self._rows.pop(digest)
        self._unwritten.pop(digest, None)
        self._experts.pop(digest, None)
        for row in rows:
            self._owner[row] = None
        return rows

    def _free_vacated(self, rows: Sequence[int]) -> None:
        """Free the rows of an adapter that left. Some may belong to its successors already."""
        self._bank.free(rows)

    def _bring_in(self, adapter: DeviceAdapter) -> list[int]:
        """Assign the first free rows to the adapter and return them."""
        rows = [row for row, owner in enumerate(self._owner) if owner is None][: adapter.max_rank]
        self._unwritten[adapter.weights_digest] = adapter
        if adapter.experts:
            self._experts[adapter.weights_digest] = adapter.experts
        for index, row in enumerate(rows):
            self._owner[row] = (adapter.weights_digest, index)
        return rows

    @abstractmethod
    def settle(self) -> None:
        """Bring the storage up to date. Call once after all changes."""

    def _write_new(self) -> None:
        for digest, adapter in self._unwritten.items():
            self._bank.write(self._rows[digest], adapter)
        self._unwritten.clear()


class Residency(RowAssignment):
    """The assignment of the rows of a RowStore. `pack` lets rows [0, active_rows) be those of the pinned adapters.

    Only a reader of a whole prefix needs that. `is_packed`: `settle` packs every time. Without, `settle` moves no rows.
    """

    def __init__(self, bank: RowStore, *, is_packed: bool = True, expert_bytes: int = 0) -> None:
        super().__init__(bank, expert_bytes)
        self._row_store, self._is_packed = bank, is_packed
        self.num_misplaced = 0  # rows of pinned adapters that `pack` would move

    def rank_indices(self) -> list[int]:
        """Return the rank index of each active row."""
        return [owner[1] for owner in self._owner[: self.active_rows] if owner is not None]

    def _free_vacated(self, rows: Sequence[int]) -> None:
        """Free the rows that have no new owner. `settle` overwrites the others anyway."""
        if free := [row for row in rows if self._owner[row] is None]:
            self._bank.free(free)

    def settle(self) -> None:
        """Write new adapters, after packing if that is to be done every time. Call once after all changes."""
        pinned = self._pinned_rows()
        self.active_rows = len(pinned)
        self.num_misplaced = sum(row >= len(pinned) for row in pinned)
        if self._is_packed:
            self.pack()
        self._write_new()
        self._row_store.set_active(max(pinned, default=-1) + 1 if self.num_misplaced else self.active_rows)

    def pack(self) -> None:
        """Swap rows so that the rows of pinned adapters form the prefix."""
        if not self.num_misplaced:
            return
        pinned = self._pinned_rows()
        holes = sorted(set(range(len(pinned))).difference(pinned))
        self._swap(sorted(row for row in pinned if row >= len(pinned)), holes)
        self.num_misplaced = 0
        self._row_store.set_active(self.active_rows)

    def _pinned_rows(self) -> list[int]:
        return [row for digest in self._pins for row in self._rows[digest]]

    def _swap(self, rows: Sequence[int], others: Sequence[int]) -> None:
        """Exchange `rows` and `others`. Rows that are not written yet are only reassigned."""
        pairs = list(zip(rows, others, strict=True))
        written = [pair for pair in pairs if not self._is_unwritten(pair[0])]
        unwritten = [pair for pair in pairs if self._is_unwritten(pair[0])]
        if written:
            self._row_store.swap([row for row, _ in written], [other for _, other in written])
        if unwritten:
            self._row_store.move([other for _, other in unwritten], [row for row, _ in unwritten])
        for row, other in pairs:
            self._owner[row], self._owner[other] = self._owner[other], self._owner[row]
            for position in (row, other):
                owner = self._owner[position]
                if owner is not None:
                    self._rows[owner[0]][owner[1]] = position

    def _is_unwritten(self, row: int) -> bool:
        owner = self._owner[row]
        return owner is not None and owner[0] in self._unwritten
