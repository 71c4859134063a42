"""Work that outlives its caller, and work within a time limit."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Background:
    """Keeps references to running tasks, which asyncio itself does not, and logs their failures."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()

    def start(self, work: Coroutine[object, object, None], what: str) -> None:
        """Run `work` in the background. Log a failure as that of `what`."""
        self._track(work).add_done_callback(lambda task: _log_failure(task, what))

    async def run(self, work: Coroutine[object, object, T]) -> T:
        """Return the result of `work`, which runs to its end even if the caller is cancelled."""
        return await asyncio.shield(self._track(work))

    async def idle(self) -> None:
        """Return when no task runs."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def cancel(self) -> None:
        """Cancel all tasks."""
        for task in self._tasks:
            if not task.get_loop().is_closed():
                task.cancel()

    def _track(self, work: Coroutine[object, object, T]) -> asyncio.Task[T]:
        # Without its caller's context: Serve cancels what was called in the context of a client that leaves.
        task = asyncio.create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


@asynccontextmanager
async def limit_time(limit: asyncio.Timeout, error: Callable[[], Exception]) -> AsyncIterator[None]:
    """Bound the block by `limit`, and raise `error()` when it expires. Another TimeoutError of the block passes."""
    try:
        async with limit:
            yield
    except TimeoutError as exc:
        if not limit.expired():
            raise
        raise error() from exc


def _log_failure(task: asyncio.Task[object], what: str) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s failed", what, exc_info=error)
