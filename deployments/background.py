"""Work that outlives its caller, work in groups, and work within a time limit."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")
Item = TypeVar("Item")
Key = TypeVar("Key")


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


async def answer_in_groups(
    items: Sequence[Item], key: Callable[[Item], Key], call: Callable[[Key, list[Item]], Awaitable[Sequence[T]]]
) -> list[T]:
    """Make one call for the items of each key. Return one answer for each item, in the order of the items."""
    groups: dict[Key, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(key(item), []).append(place)
    calls = [call(name, [items[place] for place in places]) for name, places in groups.items()]
    found: dict[int, T] = {}
    for places, answers in zip(groups.values(), await asyncio.gather(*calls), strict=True):
        found.update(zip(places, answers, strict=True))
    return [found[place] for place in range(len(items))]


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
