"""A rate with a little patience: what was not used a moment ago may be used now."""

from __future__ import annotations

import time
from collections.abc import Callable


class TokenBucket:
    """Refills evenly to `per_minute` and begins full. What is taken and turns out larger is owed.

    level(t) = min(per_minute, level(s) + (t - s) · per_minute / 60)
    """

    def __init__(self, per_minute: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds and never goes back."""
        self.per_minute = per_minute
        self._clock = clock
        self._level, self._at = per_minute, clock()

    def take(self, amount: float) -> float:
        """0 once `amount` is taken; else nothing is, and it is there after so many seconds.

        What is more than the whole bucket holds is never there: do not ask.
        """
        self._refill()
        if self._level >= amount:
            self._level -= amount
            return 0.0
        return (amount - self._level) * 60 / self.per_minute

    def settle(self, taken: float, used: float) -> None:
        """What was `taken` before it was known is `used` by now."""
        self._refill()
        self._level = min(self.per_minute, self._level + taken - used)

    @property
    def is_full(self) -> bool:
        """Whether nothing of the last minute's use is left to remember."""
        self._refill()
        return self._level >= self.per_minute

    def _refill(self) -> None:
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
