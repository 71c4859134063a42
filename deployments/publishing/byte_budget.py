"""One budget of bytes that threads share: what does not fit yet waits its turn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from deployments.errors import UploadMemoryFull


class ByteBudget:
    """At most `max_bytes` are taken at any time. Waiters come first, first served, so that a large one is not passed
    over for ever."""

    def __init__(self, max_bytes: int, wait_s: float) -> None:
        self._max_bytes, self._wait_s = max_bytes, wait_s
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self.num_taken = 0
        self.most_taken = 0

    @contextmanager
    def taken(self, num_bytes: int) -> Iterator[None]:
        """Hold so many bytes until the block ends; more than all of them count as all.

        Raises: UploadMemoryFull when they have not become free within the time to wait.
        """
        num_bytes, ticket = min(num_bytes, self._max_bytes), object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                if not self._changed.wait_for(lambda: self._may_take(ticket, num_bytes), self._wait_s):
                    raise UploadMemoryFull(self._max_bytes)
                self.num_taken += num_bytes
                self.most_taken = max(self.most_taken, self.num_taken)
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self.num_taken -= num_bytes
                self._changed.notify_all()

    def _may_take(self, ticket: object, num_bytes: int) -> bool:
        return self._waiting[0] is ticket and self.num_taken + num_bytes <= self._max_bytes
