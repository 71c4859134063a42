"""Waiting requests, each in its turn: nobody who floods the queue holds up anyone else for long."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from gpu_worker.engine.row import Row

_Sets = dict[tuple[str, ...], dict[Row, None]]  # rows of each adapter set as they came, sets in order of turn


class FairQueue:
    """Tenants take turns, within a tenant its adapter sets, and within a set the rows go as they came.

    A tenant or set whose row is taken goes behind the others; one that is passed over keeps its place. So the first
    row of a set starts after at most (tenants that wait) × (sets of its own tenant that wait) rows have been taken, not
    counting those that were put back.

    Rows that were put back wait apart, before all others: a newcomer never overtakes one of them.
    """

    def __init__(self) -> None:
        self._tenants: dict[str, _Sets] = {}  # in order of turn
        self._requeued: dict[Row, None] = {}  # the last one put back is the last
        self._by_tenant: dict[str, dict[Row, None]] = {}  # as they came, without the returned ones
        self._len = 0  # without the returned ones

    def __len__(self) -> int:
        return self._len + len(self._requeued)

    def __iter__(self) -> Iterator[Row]:
        yield from self.requeued
        yield from (row for sets in self._tenants.values() for rows in sets.values() for row in rows)

    def __contains__(self, row: Row) -> bool:
        return row in self._requeued or row in self._tenants.get(row.tenant, {}).get(row.adapter_set, {})

    @property
    def requeued(self) -> list[Row]:
        """The rows that were put back, in the order in which they go on: the last one put back first."""
        return list(reversed(self._requeued))

    def row_to_displace(self, tenant: str, max_rows: int) -> Row | None:
        """Return the row that gives its place in a queue of `max_rows` to a new one of `tenant`; None: none has to.

        A tenant that holds less than an equal share of the places takes one from the tenant that holds most: that of
        its newest row. Rows that were put back keep theirs.
        """
        num_own = len(self._by_tenant.get(tenant, {}))
        num_tenants = len(self._by_tenant.keys() | {tenant})
        largest = max(self._by_tenant.values(), key=len, default={})
        if num_own * num_tenants >= max_rows or len(largest) <= num_own + 1:
            return None
        return next(reversed(largest))

    def append(self, row: Row) -> None:
        self._tenants.setdefault(row.tenant, {}).setdefault(row.adapter_set, {})[row] = None
        self._by_tenant.setdefault(row.tenant, {})[row] = None
        self._len += 1

    def is_first(self, row: Row) -> bool:
        """Whether no row before it waits for the same adapters on behalf of the same tenant."""
        return next(iter(self._tenants[row.tenant][row.adapter_set])) is row

    def same_adapters(self, row: Row) -> list[Row]:
        """The row and, where it was not put back, all that wait for the same adapters on behalf of its tenant."""
        return [row] if row in self._requeued else list(self._tenants[row.tenant][row.adapter_set])

    def remove(self, row: Row) -> None:
        """The row waits no longer; turns stay as they are."""
        if row in self._requeued:
            del self._requeued[row]
            return
        sets = self._tenants[row.tenant]
        rows = sets[row.adapter_set]
        del rows[row]
        self._len -= 1
        if not rows:
            del sets[row.adapter_set]
        if not sets:
            del self._tenants[row.tenant]
        of_tenant = self._by_tenant[row.tenant]
        del of_tenant[row]
        if not of_tenant:
            del self._by_tenant[row.tenant]

    def dequeue(self, row: Row) -> None:
        """Remove the row; its tenant and its adapter set have had their turn, unless it was put back: it had its."""
        was_requeued = row in self._requeued
        self.remove(row)
        sets = self._tenants.get(row.tenant)
        if sets is not None and not was_requeued:
            self._tenants[row.tenant] = self._tenants.pop(row.tenant)
            if row.adapter_set in sets:
                sets[row.adapter_set] = sets.pop(row.adapter_set)

    def requeue(self, row: Row) -> None:
        """Let a row that was taken wait again, before all others."""
        self._requeued[row] = None

    def turns(self) -> Iterator[Row]:
        """Yield the returned rows, then the first row of each set, in turn.

        The next one of a set follows where the first left the queue meanwhile.
        A tenant's turn lasts until one of its rows is taken: sets that cannot start cost it nothing.
        """
        yield from self.requeued
        pending = {tenant: deque(sets) for tenant, sets in self._tenants.items()}
        while pending:
            for tenant, sets in list(pending.items()):
                while sets:
                    adapter_set = sets.popleft()
                    row = self._first(tenant, adapter_set)
                    if row is None:
                        continue
                    yield row
                    if row not in self:
                        sets.append(adapter_set)
                        break
                if not sets:
                    del pending[tenant]

    def _first(self, tenant: str, adapter_set: tuple[str, ...]) -> Row | None:
        rows = self._tenants.get(tenant, {}).get(adapter_set)
        return next(iter(rows)) if rows else None
