"""How many waiting requests may have weights of their own on the way or in host memory."""

from __future__ import annotations

from gpu_worker.engine.row import Row

MIN_ROWS = 8  # fetches that hang are few enough that others go on beside them, whatever the budget


class PrefetchWindow:
    """The waiting rows whose loads have begun: at most `max_rows`, and beyond `MIN_ROWS` only within `budget_bytes`.

    A load in progress counts as much as the loaded ones do on average.
    """

    def __init__(self, budget_bytes: int, max_rows: int) -> None:
        self._budget_bytes, self._max_rows = budget_bytes, max(max_rows, MIN_ROWS)
        self._rows: dict[Row, None] = {}  # in the order they came: where two have loads of one digest, the last counts
        self._has_room: bool | None = None  # None: to be found out

    def __contains__(self, row: Row) -> bool:
        return row in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def has_room(self) -> bool:
        """Whether another row's loads may begin, by what was loaded at the last `refresh`."""
        if self._has_room is None:
            self._has_room = len(self._rows) < MIN_ROWS or (
                len(self._rows) < self._max_rows and self.num_bytes < self._budget_bytes
            )
        return self._has_room

    @property
    def num_bytes(self) -> float:
        """Of the weights these rows keep in host memory, loads in progress estimated."""
        loads = {digest: load for row in self._rows for digest, load in row.loads.items()}.values()
        num_pending = sum(not load.done() for load in loads)
        sizes = [load.result().num_bytes for load in loads if load.done() and load.exception() is None]
        return sum(sizes) * (1 + num_pending / len(sizes)) if sizes else 0.0

    def refresh(self) -> None:
        """Loads may have ended."""
        self._has_room = None

    def add(self, row: Row) -> None:
        self._rows[row] = None
        self.refresh()

    def discard(self, row: Row) -> None:
        """The row keeps no weights any more."""
        row.loads.clear()
        if row in self._rows:
            del self._rows[row]
            self.refresh()
