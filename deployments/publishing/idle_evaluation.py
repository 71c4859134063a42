"""Evaluate a tenant's adapters after it published, while no request needs the workers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

from ray.serve.exceptions import DeploymentUnavailableError

from deployments.api import error_table
from deployments.background import Background
from deployments.calls.worker_client import Workers
from deployments.json_types import JsonObject
from deployments.observability.request_metrics import ChangeMetrics
from deployments.publishing.evaluation import Evaluator
from gpu_worker.front.engine_status import EngineStatus
from lora_store import AdapterRecord, Sample
from lora_store.lru_cache import LruCache
from retriever_svc import Scorer

logger = logging.getLogger(__name__)

QUIET_S = 30.0  # from a publish to its evaluation, so that one follows several publishes
POLL_S = 1.0
LONGEST_S = 3600.0  # including the time for which the workers are busy
MAX_REGIONS = 256  # of a tenant; a larger pool is evaluated on command alone
_LOAD_TIMEOUT_S = 3.0
_MAX_REMEMBERED = 256  # tenants
Sleep = Callable[[float], Awaitable[None]]


class IdleScorer(Scorer):
    """Scores as `scorer`, but begins each batch of examples only when no worker of their base model has a request.

    Without any worker it waits, so an evaluation starts none. Of several base models, one without any is left out.
    """

    def __init__(self, scorer: Scorer, workers: Workers, sleep: Sleep = asyncio.sleep) -> None:
        self._scorer, self._workers, self._sleep = scorer, workers, sleep

    async def scores(self, adapter: AdapterRecord, examples: Sequence[Sample]) -> Sequence[float]:
        """Return one score for each example, once the workers are idle. Raises: what the other scorer raises."""
        while not await self._is_idle(adapter):
            await self._sleep(POLL_S)
        return await self._scorer.scores(adapter, examples)

    async def can_score(self, adapter: AdapterRecord) -> bool:
        """Return whether its base model has a worker, or is the only one, which is waited for."""
        try:
            client = self._workers.made_for(adapter.base_model).client
            if len(self._workers.by_model) > 1:
                await client.broadcast_load(_LOAD_TIMEOUT_S)
        except DeploymentUnavailableError:
            return False
        except TimeoutError:  # it is busy
            pass
        return True

    async def _is_idle(self, adapter: AdapterRecord) -> bool:
        try:
            client = self._workers.made_for(adapter.base_model).client
            answers = await client.broadcast_load(_LOAD_TIMEOUT_S)
        except (DeploymentUnavailableError, TimeoutError):
            return False
        statuses = [answer for answer in answers if isinstance(answer, EngineStatus)]
        return bool(statuses) and not any(status.num_running or status.num_waiting for status in statuses)


class IdleEvaluations:
    """Runs one evaluation at a time: for each tenant that published, in order.

    Publishes of a tenant that waits add nothing. The state is that of this process; a restart forgets it.
    """

    def __init__(
        self, evaluator: Evaluator, background: Background, metrics: ChangeMetrics, *, sleep: Sleep = asyncio.sleep
    ) -> None:
        self._evaluator, self._background, self._metrics, self._sleep = evaluator, background, metrics, sleep
        self._waiting: dict[str, str] = {}  # by tenant, who published
        self._running: str | None = None
        self._is_started = False
        self._last: LruCache[str, JsonObject] = LruCache(_MAX_REMEMBERED)

    def after_publish(self, tenant: str, actor: str) -> None:
        """Evaluate the adapters of `tenant` soon."""
        self._waiting.setdefault(tenant, actor)
        if not self._is_started:
            self._is_started = True
            self._background.start(self._run(), "evaluating after a publish")

    def state_of(self, tenant: str) -> JsonObject:
        """Return whether an evaluation of `tenant` waits or runs, and how the last one ended."""
        state = "running" if tenant == self._running else "waiting" if tenant in self._waiting else "idle"
        return {"state": state, "last": self._last.get(tenant)}

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._sleep(QUIET_S)
                tenant = next(iter(self._waiting))
                await self._evaluate(tenant, self._waiting.pop(tenant))
        finally:
            self._is_started, self._running = False, None

    async def _evaluate(self, tenant: str, actor: str) -> None:
        self._running, outcome, num_regions = tenant, "ok", 0
        try:
            num_regions = await self._metrics.count("evaluate", self._ranked(tenant, actor))
        except Exception as exc:
            outcome = error_table.as_reported(exc).code
            logger.warning("the evaluation after a publish of tenant %s failed: %s", tenant, exc)
        self._running = None
        self._last.put(tenant, {"outcome": outcome, "num_regions": num_regions, "ended_at": time.time()})

    async def _ranked(self, tenant: str, actor: str) -> int:
        """Return how many regions were measured: none where the tenant has none, or too many."""
        evaluation = self._evaluator.evaluate(tenant, actor, MAX_REGIONS)
        async with asyncio.timeout(LONGEST_S), aclosing(evaluation) as steps:
            num_regions = int((await anext(steps))["total"])
            if not 0 < num_regions <= MAX_REGIONS:
                if num_regions:
                    logger.info("tenant %s has over %d regions: use `loraretriever pool evaluate`", tenant, MAX_REGIONS)
                return 0
            async for _ in steps:
                pass
            return num_regions
