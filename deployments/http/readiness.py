"""Answer whether the server is ready, at a bounded cost: `/ready` needs no key."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from deployments.api.pool_responses import ModelState, Ready, unserved_objects
from deployments.auth.authenticator import ANONYMOUS_TENANT, LOCAL_CALLER
from deployments.calls.catalogue_clients import RetrieverClient
from deployments.calls.shared import Shared
from deployments.calls.worker_client import BaseWorkers, Workers
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
        workers: Workers,
        retriever: RetrieverClient,
        *,
        has_keys: bool,
        wait_s: float = READY_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._preload = preload
        self._workers = workers
        self._retriever = retriever
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
            size, states = await self._size.get()
        finally:
            self._num_waiting -= 1
        models: Ready = {"status": "ready", "models": states} if len(states) > 1 else {"status": "ready"}
        return {
            **models,
            "generation": size.generation,
            "num_adapters": size.num_adapters,
            "unserved": unserved_objects(size.unserved),
            "refused": refused,
        }

    async def _ask(self) -> tuple[PoolSize, dict[str, ModelState]]:
        """Ask the Retriever, and the workers of every base model: the server is ready if those of one answer.

        Raises: NotReady; RayActorError if replicas keep dying.
        """
        tenant = ANONYMOUS_TENANT if self._has_keys else LOCAL_CALLER.tenant  # private adapters are not counted
        try:
            async with asyncio.timeout(self._wait_s * min(len(self._workers.by_model), 2)):
                checks = [self._check(workers) for workers in self._workers.by_model.values()]
                found = await asyncio.gather(*checks, return_exceptions=True)
                if all(isinstance(state, BaseException) for state in found):
                    raise next(state for state in found if isinstance(state, BaseException))
                states: list[ModelState] = ["unavailable" if isinstance(s, BaseException) else s for s in found]
                return await self._retriever.load(tenant), dict(zip(self._workers.by_model, states, strict=True))
        except TimeoutError as exc:
            raise NotReady(f"the Retriever or the Worker did not answer within {self._wait_s:g} s") from exc

    async def _check(self, workers: BaseWorkers) -> ModelState:
        """Ask a worker, unless that would start one. One that is silent leaves time for the Retriever."""
        async with asyncio.timeout(self._wait_s):
            await workers.check()
        return "asleep" if await workers.is_scaled_to_zero() else "ready"
