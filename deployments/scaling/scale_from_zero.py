"""What a request waits for where workers may scale to zero."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ServeStatus

from deployments.errors import WorkerStarting

KEPT_S = 1.0  # for so long after a worker answered nobody asks: it goes only after `downscale_delay_s` without requests
_WITHIN_REACH = ("HEALTHY", "UPSCALING", "DOWNSCALING")  # UPDATING is the first start, or an upgrade


class WorkerGate:
    """Holds requests until a worker runs. With `timeout_s` None workers never sleep, and nothing is held.

    The call that wakes stays in Serve's queue when those who wait have left: the next request finds a worker.
    """

    def __init__(
        self,
        worker: DeploymentHandle,
        timeout_s: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        status: Callable[[], ServeStatus] = serve.status,
    ) -> None:
        self._worker, self._timeout_s, self._clock, self._status = worker, timeout_s, clock, status
        self._call: asyncio.Task[None] | None = None
        self._answered_at: float | None = None

    async def wait(self) -> None:
        """Return when a worker runs. Raises: WorkerStarting, and what a worker that just died leaves behind."""
        if self._timeout_s is None:
            return
        if self._answered_at is not None and self._clock() - self._answered_at < KEPT_S:
            return
        if self._call is None or self._call.done():
            self._call = asyncio.create_task(self._ask())
            self._call.add_done_callback(_retrieve)
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                await asyncio.shield(self._call)
        except TimeoutError as exc:
            if limit.expired():
                raise WorkerStarting(self._timeout_s) from exc
            raise

    async def can_scale_to_zero(self) -> bool:
        """Whether no worker runs and that is as it should be: the next request starts one, or one is on its way."""
        if self._timeout_s is None:
            return False
        status = await asyncio.to_thread(self._status)
        worker = status.applications[self._worker.app_name].deployments[self._worker.deployment_name]
        return worker.replica_states.get("RUNNING", 0) == 0 and worker.status in _WITHIN_REACH

    async def _ask(self) -> None:
        await self._worker.module_shapes.remote()
        self._answered_at = self._clock()


def _retrieve(call: asyncio.Task[None]) -> None:
    """Its waiters may all have left: an error is not news to the event loop."""
    if not call.cancelled():
        call.exception()
