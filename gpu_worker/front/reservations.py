"""Reserve the bank for rows that were passed over often, so that they start, and limit what that costs others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gpu_worker.bank.residency import RowAssignment
from gpu_worker.front.row import Row

_MAX_PASSES = 50


@dataclass(slots=True)
class _Reservation:
    """`earlier`: the rows that used the part when it was reserved. `most_tokens`: see `Reservations.update`."""

    row: Row
    since: float
    earlier: list[Row]
    most_tokens: float = math.inf


class Reservations:
    """The row that each part of the bank is reserved for, until that row ends.

    A row may reserve its part after it was passed over `_MAX_PASSES` times. Until it has its adapters, another row may
    pin adapters there only if it should end no later than a row that ran already when the part was reserved. So the
    reserving row waits for those rows, and then for rows that started before the last of them had ended: at most two
    answers, one after the other, however many rows arrive.

    When the reserving row has ended, no row may reserve the part for as long as the reservation lasted, that row's
    answer included. So reservations hold other rows up for at most half of the time.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._by_part: dict[RowAssignment, _Reservation] = {}
        self._next_at: dict[RowAssignment, float] = {}  # the earliest time of a part's next reservation

    @property
    def rows(self) -> list[Row]:
        """Return the reserving rows that wait for their adapters."""
        return [reservation.row for reservation in self._by_part.values() if not reservation.row.is_pinned]

    def reserve(self, part: RowAssignment, row: Row, users: Iterable[Row]) -> None:
        """Reserve the part for a row that it had no room for, if that is allowed. `users`: the rows that run in it."""
        if row.num_passes < _MAX_PASSES or part in self._by_part:
            return
        if self._clock() >= self._next_at.get(part, -math.inf):
            self._by_part[part] = _Reservation(row, self._clock(), list(users))
            self.update(row, has_weights=True)

    def update(self, row: Row, *, has_weights: bool) -> None:
        """Find how many tokens a row may be expected to make to start before this reserving row.

        While the reserving row lacks weights, it holds up no others.
        """
        for reservation in self._by_part.values():
            if reservation.row is row:
                running = [user.most_left for user in reservation.earlier if user.is_pinned]
                reservation.most_tokens = max(running, default=0) if has_weights else math.inf

    def hold_up(self, part: RowAssignment, row: Row) -> bool:
        """Return whether the row must wait for the part because it is reserved."""
        reservation = self._by_part.get(part)
        if reservation is None or reservation.row.is_pinned:
            return False
        return reservation.row is row or row.expected_left > reservation.most_tokens

    def end(self, row: Row) -> None:
        """End the reservation of a row that has ended, if it made one."""
        for part, reservation in list(self._by_part.items()):
            if reservation.row is row:
                del self._by_part[part]
                now = self._clock()
                self._next_at[part] = now + (now - reservation.since)
