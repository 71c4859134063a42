"""Answer whether the server is ready, at a bounded cost: `/ready` needs no key."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from deployments.api.pool_responses import Ready, unserved_objects
from deployments.auth.authenticator import ANONYMOUS_TENANT, LOCAL_CALLER
from deployments.calls.catalogue_clients import RetrieverClient
from deployments.calls.shared import Shared
from deployments.calls.worker_client import WorkerClient, WorkerGate
from deployments.errors import NotReady
from deployments.publishing.preload import Preload
from retriever_svc import PoolSize

READY_WAIT_S = 5.0
KEPT_S = 0.5  # Retriever and Worker are called once in this time, however many clients call /ready
MAX_WAITING = 256  # clients that wait for one answer


class Readiness:
    """Checks that Retriever and Worker answer and that the preload is published."""

    def __init__(
        self,
        preload: Preload,
        gate: WorkerGate,
        retriever: RetrieverClient,
        worker: WorkerClient,
        *,
        has_keys: bool,
        wait_s: float = READY_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._preload = preload
        self._gate = gate
        self._retriever = retriever
        self._worker = worker
        self._has_keys = has_keys
        self._wait_s = wait_s
        self._size = Shared(self._ask, kept_s=KEPT_S, keeps_errors=True, clock=clock)
        self._num_waiting = 0

    async def public(self) -> Ready:
        """Return the public answer: with keys, only the status. Raises: NotReady."""
        found = await self.details()
        if self._has_keys:
            return {"status": found["status"]}
        refused: dict[str, str] = {}
        for path, reason in found["refused"].items():
            name = Path(path).name  # clients must not learn the server's paths
            reason = reason.replace(path, name)
            refused[name] = f"{refused[name]}; {reason}" if name in refused else reason
        return {**found, "refused": refused}

    async def details(self) -> Ready:
        """Return the answer for the operator, with the paths of refused folders. Raises: NotReady."""
        refused = self._preload.refused()
        if self._num_waiting >= MAX_WAITING:
            raise NotReady(f"{MAX_WAITING} clients wait for this answer already; ask again later")
        self._num_waiting += 1
        try:
            size = await self._size.get()
        finally:
            self._num_waiting -= 1
        return {
            "status": "ready",
            "generation": size.generation,
            "num_adapters": size.num_adapters,
            "unserved": unserved_objects(size.unserved),
            "refused": refused,
        }

    async def _ask(self) -> PoolSize:
        """Call both deployments. Raises: NotReady; RayActorError if replicas keep dying."""
        tenant = ANONYMOUS_TENANT if self._has_keys else LOCAL_CALLER.tenant  # private adapters are not counted
        try:
            async with asyncio.timeout(self._wait_s):
                if not await self._gate.is_scaled_to_zero():  # asking would start one
                    await self._worker.module_shapes()
                return await self._retriever.load(tenant)
        except TimeoutError as exc:
            raise NotReady(f"the Retriever or the Worker did not answer within {self._wait_s:g} s") from exc
