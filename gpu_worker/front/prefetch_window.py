"""Limit the number of waiting requests whose weights are prefetched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future

from gpu_worker.bank.device_layout import DeviceAdapter
from gpu_worker.front.fair_share import FairShare
from gpu_worker.front.row import Row

_Loads = Mapping[str, "Future[DeviceAdapter]"]
MIN_ROWS = 8  # always allowed, so that hanging fetches do not stop all others


class PrefetchWindow:
    """The waiting rows whose loads have begun: at most `max_rows`, and above `MIN_ROWS` only within `budget_bytes`.

    Tenants share the places by the rule of FairShare. A row that makes room loses its loads, which go on in the loader.
    A load in progress counts with the average size of the completed loads.
    `pending_parts`: the loads that the load of a digest waits for, which count too.
    """

    def __init__(self, budget_bytes: int, max_rows: int, pending_parts: Callable[[str], _Loads] = lambda _: {}) -> None:
        self._budget_bytes, self._max_rows = budget_bytes, max(max_rows, MIN_ROWS)
        self._pending_parts = pending_parts
        self._rows: dict[Row, None] = {}  # in order of arrival; for a shared digest the last row's load counts
        self._places = FairShare()
        self._has_room: bool | None = None  # None: not computed yet
        self._may_displace: dict[str, bool] = {}  # tenant -> whether another one makes room for it

    def __contains__(self, row: Row) -> bool:
        return row in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def has_room(self) -> bool:
        """Return whether another row may begin its loads. The result is cached until the next `refresh`."""
        if self._has_room is None:
            self._has_room = len(self._rows) < MIN_ROWS or (
                len(self._rows) < self._max_rows and self.num_bytes < self._budget_bytes
            )
        return self._has_room

    def has_room_for(self, tenant: str) -> bool:
        """Return whether a row of the tenant may begin its loads. Another tenant may have to make room.

        The result is cached until the next `refresh`.
        """
        if self.has_room:
            return True
        if tenant not in self._may_displace:
            self._may_displace[tenant] = self._places.displaced_by(tenant, len(self._rows)) is not None
        return self._may_displace[tenant]

    @property
    def num_bytes(self) -> float:
        """Return the bytes of these rows' weights in host memory, with an estimate for loads in progress."""
        of_rows = {digest: load for row in self._rows for digest, load in row.loads.items()}
        parts = {part: load for digest in of_rows for part, load in self._pending_parts(digest).items()}
        loads = (parts | of_rows).values()
        num_pending = sum(not load.done() for load in loads)
        sizes = [load.result().num_bytes for load in loads if load.done() and load.exception() is None]
        return sum(sizes) * (1 + num_pending / len(sizes)) if sizes else 0.0

    def refresh(self) -> None:
        """Forget the cached results, because loads may have ended."""
        self._has_room = None
        self._may_displace.clear()

    def add(self, row: Row) -> None:
        """Add a row whose loads have begun. In a full window the newest row of the tenant with most makes room."""
        if row not in self._rows:
            if not self.has_room:
                self._displace(row.tenant)
            self._rows[row] = None
            self._places.take(row.tenant)
        self.refresh()

    def discard(self, row: Row) -> None:
        """Remove the row and its loads."""
        row.loads.clear()
        if row in self._rows:
            del self._rows[row]
            self._places.give(row.tenant)
            self.refresh()

    def _displace(self, tenant: str) -> None:
        most = self._places.displaced_by(tenant, len(self._rows))
        if most is not None:
            self.discard(next(row for row in reversed(self._rows) if row.tenant == most))
