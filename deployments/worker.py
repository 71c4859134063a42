"""The Worker deployment: one engine on one device.

Its constructor imports the engine, whose libraries take seconds and memory: the process that builds the application,
and those of the other deployments that import this module, do without them.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from ray.serve.handle import DeploymentHandle

from deployments.auth.ray_token import require_token_mode
from deployments.calls.catalogue_clients import serve_store
from deployments.calls.worker_client import HEARTBEAT_INTERVAL_S, Usage
from deployments.errors import ReplicaStuck
from deployments.observability.logs import join_serve_logs, own_replica_id
from deployments.observability.metrics import REPORT_INTERVAL_S, SERVE, MetricFactory, report_periodically
from deployments.observability.worker_metrics import JobTrace, TenantUsage, WorkerMetrics, count_tokens
from deployments.private_names import check_libraries
from deployments.scaling.autoscaling_policy import ONGOING, WAITING_TOKENS
from deployments.scaling.residency import Residency, ResidencyReport
from deployments.weights import WeightsFetcher
from gpu_worker.config import NativeWorkerConfig, VllmWorkerConfig
from gpu_worker.errors import EngineStopped
from gpu_worker.front.engine_status import EngineStatus
from gpu_worker.front.request.request import Delta, Job, Prompt, TokenIds, Tokenized
from gpu_worker.front.request.tools import Tools
from lora_store import AdapterWeights
from lora_store.disk_cache import DiskCache

if TYPE_CHECKING:
    from gpu_worker.engine import EngineHealth, InferenceEngine

logger = logging.getLogger(__name__)

# The mean time between two pieces of text of a stream; the second piece comes after 0.5 to 1.5 of it. The streams of a
# worker together send at most 64 pieces a second for each CPU, so many streams wait longer.
STREAM_INTERVAL_MS = 25.0


def import_engine(*, is_native: bool) -> None:
    """Import the engine, the native one without scipy, and check the libraries that it uses.

    Garbage collection is off meanwhile, which saves a quarter of the time. Later collections skip the objects of the
    modules, which stay.
    """
    if "gpu_worker.start" in sys.modules:
        return
    gc.disable()
    try:
        if is_native:
            importlib.import_module("deployments.transformers_import")  # before anything else imports transformers
        check_libraries(of_engine=True)
        importlib.import_module("gpu_worker.start")
    finally:
        gc.freeze()
        gc.enable()


class WorkerDeployment:
    """One engine. Requests wait in its queue, where their adapters are prefetched.

    `weights_cache`: folder and quota in bytes of a disk cache that the workers of this machine share, or None.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: NativeWorkerConfig | VllmWorkerConfig,
        store: DeploymentHandle,
        weights_cache: tuple[Path, int] | None = None,
        *,
        stream_interval_ms: float = STREAM_INTERVAL_MS,
        allow_unauthenticated_ray: bool = False,
        kinds: MetricFactory = SERVE,
        end_process: Callable[[int], object] = os._exit,
    ) -> None:
        join_serve_logs()
        require_token_mode(allow_unauthenticated=allow_unauthenticated_ray)
        import_engine(is_native=isinstance(config, NativeWorkerConfig))
        from gpu_worker.bank.load_threads import load_executor, use_one_thread
        from gpu_worker.start import start_engine

        self._metrics = WorkerMetrics(config.num_rank_rows, kinds)
        self._usage = TenantUsage()
        self._asyncio_loop = asyncio.get_event_loop()
        self._cache = None if weights_cache is None else DiskCache(*weights_cache)
        use_one_thread()
        executor = load_executor(config.load_threads)
        self._fetcher = WeightsFetcher(serve_store(store), executor, cache=self._cache, observer=self._metrics)
        self._engine: InferenceEngine = await start_engine(
            config,
            self._start_fetch,
            executor=executor,
            stream_interval_ms=stream_interval_ms,
            niceness=config.niceness,
            reports_to_ray=True,
        )
        self._residency = Residency(own_replica_id(), self._engine.expected)
        self._reporting = self._asyncio_loop.create_task(report_periodically(self._report))
        self._step_timeout_s, self._end_process = config.step_timeout_s, end_process

    async def stream(self, job: Job) -> AsyncIterator[Delta | ResidencyReport]:
        """Yield the first text at once, then text every `stream_interval_ms`. A report is a heartbeat.

        A client that leaves frees its row, KV and pins at the next step.
        Raises: PromptInvalid, PromptTooLong, PlanTooLarge, AdapterLoadFailed and other errors of this job.
        """
        deltas = self._engine.stream(job, HEARTBEAT_INTERVAL_S)
        trace = JobTrace(job, self._metrics.loads)
        last: Delta | None = None
        try:
            with self._usage.row(job.tenant) as usage:
                async for delta in deltas:
                    if delta is None:
                        yield self._residency.report([adapter.weights_digest for adapter in job.plan.adapters])
                        continue
                    if last is None:
                        self._residency.refresh()
                        self._metrics.waited(delta.queued_s)
                    trace.answered()
                    count_tokens(usage, delta, last)
                    last = delta
                    yield delta
        except EngineStopped:
            self.check_health()  # an ended engine refuses fast, and would attract requests until the next health check
            raise
        finally:
            await deltas.aclose()
            trace.end(last)
            if last is None:
                self._residency.refresh()

    async def probe_many(self, weights_digests: Sequence[str]) -> list[float | Exception]:
        """Return how much each adapter changes the logits of a fixed prompt, or its error. All are in one batch."""
        return await self._engine.probe(weights_digests)

    async def tokenize(
        self,
        tenant: str,
        prompt: Prompt,
        template: str,
        add_special_tokens: bool | None,
        with_texts: bool,
        tools: Tools | None = None,
    ) -> Tokenized:
        """See Tokenizing."""
        return await self._engine.tokenizer.tokenize(
            prompt, template, tenant=tenant, add_special_tokens=add_special_tokens, with_texts=with_texts, tools=tools
        )

    async def detokenize(self, tenant: str, prompts: Sequence[TokenIds], skip_special_tokens: bool) -> list[str]:
        """See Tokenizing."""
        return await self._engine.tokenizer.detokenize(prompts, tenant=tenant, skip_special_tokens=skip_special_tokens)

    async def forget(self, weights_digests: Collection[str]) -> bool:
        """Drop these weights. Return whether none is left; weights in use are dropped after their last request."""
        is_gone = await self._engine.forget(weights_digests)
        if self._cache is not None:
            await asyncio.to_thread(self._cache.discard, weights_digests)
        return is_gone

    async def load(self) -> EngineStatus:
        """Return the state of this replica: cheap enough for every second."""
        return await self._engine.status()

    async def usage(self) -> Mapping[str, Usage]:
        """Return each tenant's usage of this replica."""
        return self._usage.read()

    async def module_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return (out, in) of every module that an adapter may target."""
        return dict(self._engine.module_shapes)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the inputs of `WorkerScaling`."""
        held = await self._engine.status()
        return {ONGOING: held.num_running + held.num_waiting, WAITING_TOKENS: held.waiting_tokens}

    def check_health(self) -> None:
        """End this process if its engine hangs or has ended, so that Serve replaces the replica.

        Its requests then start again on other replicas. Raising an error is not enough: Serve 2.60 would first wait for
        the end of the replica's streams, which would never come, and its successor may need the device of this process.
        Raises: ReplicaStuck.
        """
        health = self._engine.health()
        if health.is_alive and health.busy_s <= self._step_timeout_s:
            return
        wedged = ReplicaStuck(_why_wedged(health))
        logger.critical("ending this replica's process: %s", wedged)
        self._engine.kill()  # its processes would keep the device, which the successor needs
        self._end_process(1)
        raise wedged

    async def _report(self) -> None:
        self._metrics.report_step_age(self._engine.health().busy_s)
        self._metrics.report_missing_kernels(self._engine.num_missing_kernels)
        async with asyncio.timeout(
            REPORT_INTERVAL_S
        ):  # report the duration of a hanging step before anything can block
            self._metrics.report_status(await self._engine.status())

    def _start_fetch(self, weights_digest: str) -> Future[AdapterWeights]:
        """Start a fetch on the replica's event loop. The engine may call this from another thread."""
        return self._fetcher.start(weights_digest, self._asyncio_loop)


def _why_wedged(health: EngineHealth) -> str:
    if health.is_alive:
        return f"a step or command of the engine has run for {health.busy_s:.0f} s"
    return health.failure or "the engine has ended"
