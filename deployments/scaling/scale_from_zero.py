"""Hold requests until a worker runs, where workers may scale to zero."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from deployments.calls.store_client import Shapes
from deployments.calls.worker_client import WorkerClient
from deployments.errors import WorkerStarting

# After an answer no worker is asked for this long: Serve removes one only after `downscale_delay_s` without requests.
KEPT_S = 1.0


class WorkerGate:
    """Holds requests until a worker runs. With `timeout_s` None workers never scale to zero, and nothing is held.

    The call that starts a worker stays in Serve's queue when its waiters have left, so the next request finds a worker.
    """

    def __init__(
        self, worker: WorkerClient, timeout_s: float | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._worker, self._timeout_s, self._clock = worker, timeout_s, clock
        self._call: asyncio.Task[Shapes] | None = None
        self._last: tuple[float, Shapes] | None = None  # when a worker answered, and what

    async def ready(self) -> None:
        """Return when a worker runs. Raises: WorkerStarting; the error of a worker that just died."""
        if self._timeout_s is not None:
            await self._ask(self._timeout_s)

    async def module_shapes(self) -> Shapes:
        """Return the module shapes when a worker runs. Raises: WorkerStarting; the error of a worker that just died."""
        if self._timeout_s is None:
            return await self._worker.module_shapes()
        return await self._ask(self._timeout_s)

    async def is_scaled_to_zero(self) -> bool:
        """Return whether no worker runs because none is needed: the next request starts one."""
        return self._timeout_s is not None and await self._worker.is_scaled_to_zero()

    async def _ask(self, timeout_s: float) -> Shapes:
        if self._last is not None and self._clock() - self._last[0] < KEPT_S:
            return self._last[1]
        if self._call is None or self._call.done():
            self._call = asyncio.create_task(self._wait_for_replica())
            self._call.add_done_callback(_retrieve)
        try:
            async with asyncio.timeout(timeout_s) as limit:
                return await asyncio.shield(self._call)
        except TimeoutError as exc:
            if limit.expired():
                raise WorkerStarting(timeout_s) from exc
            raise

    async def _wait_for_replica(self) -> Shapes:
        shapes = await self._worker.wait_for_replica()
        self._last = self._clock(), shapes
        return shapes


def _retrieve(call: asyncio.Task[Shapes]) -> None:
    """Retrieve the error of a call whose waiters have left, which asyncio would log otherwise."""
    if not call.cancelled():
        call.exception()
