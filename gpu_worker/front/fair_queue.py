"""A queue that shares turns among tenants, so that a flood from one tenant does not delay the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Generic, Protocol, TypeAlias, TypeVar

from gpu_worker.errors import EngineFull
from gpu_worker.front.fair_share import FairShare


class Queued(Protocol):
    """An item of a FairQueue: a row of an engine, or a call, whose `adapter_set` is empty."""

    @property
    def tenant(self) -> str: ...
    @property
    def adapter_set(self) -> tuple[str, ...]: ...


Item = TypeVar("Item", bound=Queued)
# The rows of each adapter set in order of arrival, and the sets in order of turn.
_Sets: TypeAlias = dict[tuple[str, ...], dict[Item, None]]
_MOST_SKIPPED = 16  # rows of a set, because every row behind them is compared with them


class FairQueue(Generic[Item]):
    """Tenants take turns, then the adapter sets of a tenant, then the rows of a set in order of arrival.

    When a row is dequeued, its tenant and set go behind the others; those passed over keep their place. So the first
    row of a set starts after at most (waiting tenants) × (waiting sets of its tenant) dequeued rows, not counting
    requeued ones.

    Requeued rows wait separately, before all others: a new row never overtakes them.
    """

    def __init__(self) -> None:
        self._tenants: dict[str, _Sets[Item]] = {}  # in order of turn
        self._requeued: dict[Item, None] = {}  # the most recently requeued row is last
        self._by_tenant: dict[str, dict[Item, None]] = {}  # in order of arrival, without requeued rows
        self._places = FairShare()  # without those of requeued rows

    def __len__(self) -> int:
        return self._places.num_held + len(self._requeued)

    def __iter__(self) -> Iterator[Item]:
        yield from self.requeued
        yield from (row for sets in self._tenants.values() for rows in sets.values() for row in rows)

    def __contains__(self, row: Item) -> bool:
        return row in self._requeued or row in self._tenants.get(row.tenant, {}).get(row.adapter_set, {})

    @property
    def tenants(self) -> Collection[str]:
        """Return the tenants whose rows wait, in order of turn, without those of requeued rows."""
        return self._tenants.keys()

    @property
    def requeued(self) -> list[Item]:
        """Return the requeued rows in their order of turn: the most recently requeued first."""
        return list(reversed(self._requeued))

    def displaced_by(self, tenant: str, max_rows: int) -> tuple[Item, EngineFull] | None:
        """Return the row that leaves a queue of `max_rows` for one of `tenant`, with its error; None if there is room.

        Raises: EngineFull if no row leaves for this tenant.
        """
        if len(self) < max_rows:
            return None
        full = EngineFull(f"the queue is full ({max_rows} requests); retry later")
        row = self.row_to_displace(tenant, max_rows)
        if row is None:
            raise full
        return row, full

    def row_to_displace(self, tenant: str, max_rows: int) -> Item | None:
        """Return the row that a new row of `tenant` displaces in a full queue of `max_rows`, or None.

        It is the newest of the tenant that FairShare names. Requeued rows keep their places.
        """
        most = self._places.displaced_by(tenant, max_rows)
        return None if most is None else next(reversed(self._by_tenant[most]))

    def append(self, row: Item) -> None:
        """Add a new row."""
        self._tenants.setdefault(row.tenant, {}).setdefault(row.adapter_set, {})[row] = None
        self._by_tenant.setdefault(row.tenant, {})[row] = None
        self._places.take(row.tenant)

    def is_first(self, row: Item) -> bool:
        """Return whether the row is the first of its tenant with its adapters."""
        return next(iter(self._tenants[row.tenant][row.adapter_set])) is row

    def same_adapters(self, row: Item) -> list[Item]:
        """Return the row and, unless it was requeued, all rows of its tenant with the same adapters."""
        return [row] if row in self._requeued else list(self._tenants[row.tenant][row.adapter_set])

    def remove(self, row: Item) -> None:
        """Remove the row without changing the order of turns."""
        if row in self._requeued:
            del self._requeued[row]
            return
        sets = self._tenants[row.tenant]
        rows = sets[row.adapter_set]
        del rows[row]
        self._places.give(row.tenant)
        if not rows:
            del sets[row.adapter_set]
        if not sets:
            del self._tenants[row.tenant]
        of_tenant = self._by_tenant[row.tenant]
        del of_tenant[row]
        if not of_tenant:
            del self._by_tenant[row.tenant]

    def dequeue(self, row: Item) -> None:
        """Remove the row and end the turn of its tenant and adapter set. A requeued row had its turn before."""
        was_requeued = row in self._requeued
        self.remove(row)
        sets = self._tenants.get(row.tenant)
        if sets is not None and not was_requeued:
            self._tenants[row.tenant] = self._tenants.pop(row.tenant)
            if row.adapter_set in sets:
                sets[row.adapter_set] = sets.pop(row.adapter_set)

    def requeue(self, row: Item) -> None:
        """Add a dequeued row again, before all others."""
        self._requeued[row] = None

    def turns(self, skipped: Collection[Item] = ()) -> Iterator[Item]:
        """Yield the requeued rows, then the first row of each set, in turn.

        If that row leaves the queue meanwhile, the next row of its set follows later. If the caller adds it to
        `skipped`, the next row follows at once, but not behind many.
        A tenant's turn lasts until one of its rows is dequeued, so sets that cannot start do not cost it its turn.
        """
        yield from self.requeued
        pending = {tenant: deque(sets) for tenant, sets in self._tenants.items()}
        while pending:
            for tenant, sets in list(pending.items()):
                while sets:
                    adapter_set = sets.popleft()
                    row = self._first(tenant, adapter_set, skipped)
                    if row is None:
                        continue
                    yield row
                    if row in skipped:
                        sets.appendleft(adapter_set)
                    elif row not in self:
                        sets.append(adapter_set)
                        break
                if not sets:
                    del pending[tenant]

    def _first(self, tenant: str, adapter_set: tuple[str, ...], skipped: Collection[Item]) -> Item | None:
        rows = self._tenants.get(tenant, {}).get(adapter_set, {})
        return next((row for row in islice(rows, _MOST_SKIPPED + 1) if row not in skipped), None)
