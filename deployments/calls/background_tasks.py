"""Work that outlives the call it began in."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Background:
    """Keeps hold of running tasks, which asyncio itself does not, and says when one fails."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, None], what: str) -> None:
        """Let `work` run by itself; should it fail, the log says that `what` did."""
        self._track(work).add_done_callback(lambda task: _log_failure(task, what))

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives. It goes on to its end when the caller is cancelled."""
        return await asyncio.shield(self._track(work))

    async def idle(self) -> None:
        """Return once nothing runs any more."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def cancel(self) -> None:
        """End everything that still runs."""
        for task in self._tasks:
            if not task.get_loop().is_closed():
                task.cancel()

    def _track(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        # Without its caller's context: Serve cancels what was called in the context of a client that leaves.
        task = asyncio.create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _log_failure(task: asyncio.Task[Any], what: str) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s failed", what, exc_info=error)
