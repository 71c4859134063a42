"""One call whose answer all of its callers share."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """Makes one call for everyone who wants its answer while it runs, and until `kept_s` after it ended.

    A caller that leaves does not cancel the call of the others. A call that failed is made again for the next caller;
    with `keeps_errors` only when `kept_s` have passed.
    """

    def __init__(
        self,
        call: Callable[[], Coroutine[Any, Any, T]],
        *,
        kept_s: float,
        keeps_errors: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._call = call
        self._kept_s = kept_s
        self._keeps_errors = keeps_errors
        self._clock = clock
        self._running: asyncio.Task[T] | None = None
        self._ended_s = 0.0

    async def get(self) -> T:
        """Return the answer. Raises: the error of the call."""
        return await asyncio.shield(self.start())

    def start(self) -> asyncio.Task[T]:
        """Make the call, unless it runs or its answer is kept. Return its task, which callers must not cancel."""
        if self._running is None or not self._is_fresh(self._running):
            # Without the caller's context: Serve cancels what was called in the context of a client that leaves.
            self._running = asyncio.create_task(self._timed_call(), context=contextvars.Context())
            # Retrieve the error if all callers have left: asyncio would log it.
            self._running.add_done_callback(_failed)
        return self._running

    async def _timed_call(self) -> T:
        try:
            return await self._call()
        finally:
            self._ended_s = self._clock()

    def _is_fresh(self, running: asyncio.Task[T]) -> bool:
        if not running.done():
            return True
        is_kept = self._keeps_errors or not _failed(running)
        return is_kept and self._clock() - self._ended_s < self._kept_s


def _failed(task: asyncio.Task[T]) -> bool:
    return task.cancelled() or task.exception() is not None
