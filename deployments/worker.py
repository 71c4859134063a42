"""The Worker deployment: one engine on one device."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

import numpy as np
from numpy.typing import NDArray
from ray.serve.handle import DeploymentHandle

from deployments.errors import ReplicaWedged
from gpu_worker.config import WorkerConfig
from gpu_worker.engine import Engine
from gpu_worker.engine_loop import EngineLoop
from gpu_worker.probe import probe_shift
from gpu_worker.request import Delta, Job
from lora_store import AdapterWeights, decode_weights

_WEDGED_AFTER_S = 120.0
_FETCH_TIMEOUT_S = 60.0


class WorkerDeployment:
    """Waiting happens in the engine's queue, where loads are."""

    def __init__(self, config: WorkerConfig, stream_interval_ms: float, store: DeploymentHandle) -> None:
        self._store = store
        self._asyncio_loop = asyncio.get_event_loop()
        self._engine = Engine(config, self._fetch)
        self._loop = EngineLoop(self._engine, stream_interval_ms=stream_interval_ms)
        self._probe_numbers = itertools.count()

    async def stream(self, job: Job) -> AsyncIterator[Delta]:
        """Yield text as it is made, the first piece at once, then every `stream_interval_ms`.

        A client that leaves frees its row, KV and pins at the next step.
        Raises: PromptInvalid, PromptTooLong, PlanTooLarge, AdapterLoadFailed and the like, for this job only.
        """
        deltas = self._loop.stream(job)
        try:
            async for delta in deltas:
                yield delta
        finally:
            await deltas.aclose()

    async def probe(self, weights_digest: str) -> float:
        """How far the adapter moves the logits of a fixed prompt. Raises: AdapterUnfit, AdapterLoadFailed."""
        return await probe_shift(self._loop, weights_digest, f"probe-{next(self._probe_numbers)}")

    async def module_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every module an adapter may target."""
        return self._engine.bank.shapes

    def check_health(self) -> None:
        """Raises: ReplicaWedged, so that Serve replaces this replica."""
        stalled_s = self._loop.seconds_in_step()
        if not self._loop.is_alive or stalled_s > _WEDGED_AFTER_S:
            raise ReplicaWedged(f"a step has run for {stalled_s:.0f} s, engine thread alive: {self._loop.is_alive}")

    def _fetch(self, weights_digest: str) -> AdapterWeights:
        """Runs on a loading thread; the handle belongs to the replica's event loop."""
        fetching = asyncio.run_coroutine_threadsafe(self._fetch_bytes(weights_digest), self._asyncio_loop)
        data = fetching.result(timeout=_FETCH_TIMEOUT_S)
        return decode_weights(weights_digest, data)

    async def _fetch_bytes(self, weights_digest: str) -> NDArray[np.uint8]:
        data: NDArray[np.uint8] = await self._store.fetch.remote(weights_digest)
        return data
