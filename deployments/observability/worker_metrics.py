"""Metrics of a Worker replica, read from the engine at intervals, and the usage of each tenant."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

from opentelemetry import context
from opentelemetry.util.types import AttributeValue

from deployments.calls.worker_client import Usage
from deployments.observability.metrics import SECONDS, SERVE, SHORT_SECONDS, MetricFactory
from deployments.observability.tracing import tracer
from gpu_worker.front.engine_status import Counters, EngineStatus
from gpu_worker.front.request.request import Delta, Job

logger = logging.getLogger(__name__)
_MAX_TENANTS = 4096  # tenants come and go with the keys file
_MAX_LOADS = 1_024  # remembered ones: a job asks for those of its own adapters when it ends
# Name, labels and meaning of the metric of each engine counter. `loaded` counts fetches, by source.
COUNTER_METRICS: dict[str, tuple[str, dict[str, str], str] | None] = {
    "num_requests": ("loraretriever_engine_requests_total", {}, "Requests submitted to the engine"),
    "num_prompt_tokens": ("loraretriever_prompt_tokens_total", {}, "Prompt tokens of answered requests"),
    "num_new_tokens": ("loraretriever_new_tokens_total", {}, "Tokens generated"),
    "num_bank_hits": (
        "loraretriever_adapter_hits_total",
        {"level": "bank"},
        "Adapters of requests by the cache level they were found in",
    ),
    "num_host_hits": (
        "loraretriever_adapter_hits_total",
        {"level": "host"},
        "Adapters of requests by the cache level they were found in",
    ),
    "num_fetches": None,
    "num_cached_tokens": (
        "loraretriever_prefix_cache_hit_tokens_total",
        {},
        "Prompt tokens found in the prefix cache",
    ),
    "num_evicted_blocks": (
        "loraretriever_prefix_cache_evictions_total",
        {},
        "Blocks that the prefix cache gave up for others",
    ),
    "num_preemptions": ("loraretriever_preemptions_total", {}, "Rows whose KV cache was released to be computed again"),
    "num_steps": ("loraretriever_steps_total", {}, "Steps of the engine"),
    "step_s": ("loraretriever_step_seconds_total", {}, "Time spent in engine steps"),
}
_SHADOW, _SHADOW_FOR_OTHERS = "shadow:", "shadow for others:"  # no tenant's name has a colon
_LABELS = {"loraretriever_adapter_hits_total": ("level",)}


def shadow_tenant(owner: str, sender: str) -> str:
    """Return the tenant of the shadows of this owner's versions, which no key has. `sender`: of the requests.

    So a shadow takes no turn of a tenant, and shares no keys and values with one. The shadows of other tenants'
    requests have a name of their own, because they do not count for the owner.
    """
    return (_SHADOW if sender == owner else _SHADOW_FOR_OTHERS) + owner


class TenantUsage:
    """Usage by tenant, on one event loop. Above `max_tenants` the least recently active tenant is forgotten."""

    def __init__(self, max_tenants: int = _MAX_TENANTS) -> None:
        self._max_tenants = max_tenants
        self._usages: OrderedDict[str, Usage] = OrderedDict()

    @contextmanager
    def row(self, tenant: str) -> Iterator[Usage]:
        """Count a row while it runs. Yield the usage for its tokens.

        A shadow of the owner's own request counts for the owner, another one for no tenant: its number of tokens says
        how long the other tenant's text is.
        """
        tenant = tenant.removeprefix(_SHADOW)
        usage = self._usages.setdefault(tenant, Usage())
        self._usages.move_to_end(tenant)
        if len(self._usages) > self._max_tenants:
            self._usages.popitem(last=False)
        usage.num_requests += 1
        usage.num_running += 1
        try:
            yield usage
        finally:
            usage.num_running -= 1

    def read(self) -> Mapping[str, Usage]:
        """Return a copy of the counts."""
        return {tenant: replace(usage) for tenant, usage in self._usages.items()}


def count_tokens(usage: Usage, delta: Delta, last: Delta | None) -> None:
    """Add the tokens of a row since its `last` delta."""
    usage.num_prompt_tokens += delta.num_prompt_tokens - (0 if last is None else last.num_prompt_tokens)
    usage.num_new_tokens += delta.num_new_tokens - (0 if last is None else last.num_new_tokens)


@dataclass(frozen=True, slots=True)
class Load:
    """The last load of some weights, in nanoseconds since the epoch. `source`: `disk` or `store`; "" if it failed."""

    source: str
    began_ns: int
    ended_ns: int


class WorkerMetrics:
    """Reports an engine's status and counters. `bank_rank_rows`: the size of the bank.

    `loads`: the last loads by weights digest, for traces.
    """

    def __init__(self, bank_rank_rows: int, factory: MetricFactory = SERVE) -> None:
        self._bank_rank_rows = bank_rank_rows
        self.loads: OrderedDict[str, Load] = OrderedDict()
        self._last = Counters()
        texts = {metric[0]: metric[2] for metric in COUNTER_METRICS.values() if metric is not None}
        self._counters = {name: factory.Counter(name, text, _LABELS.get(name, ())) for name, text in texts.items()}
        self._hits = self._counters["loraretriever_adapter_hits_total"]
        self._running = factory.Gauge("loraretriever_running_rows", "Rows in the running batch")
        self._waiting = factory.Gauge("loraretriever_waiting_rows", "Rows in the engine's queue")
        self._bank = factory.Gauge(
            "loraretriever_bank_rows", "Rank rows of the bank by state: active, idle, free", ("state",)
        )
        self._resident = factory.Gauge("loraretriever_resident_adapters", "Adapters in the bank")
        self._host_bytes = factory.Gauge("loraretriever_host_cache_bytes", "Adapter weights cached in host memory")
        self._free_kv = factory.Gauge("loraretriever_kv_free_rows", "Free rows of the KV cache")
        self._free_kv_tokens = factory.Gauge("loraretriever_kv_free_tokens", "Free tokens of the KV cache")
        self._kv_tokens = factory.Gauge("loraretriever_kv_tokens", "Used tokens of the KV cache")
        self._prefix_tokens = factory.Gauge(
            "loraretriever_prefix_cache_tokens", "Tokens in the blocks of the prefix cache, in use or kept"
        )
        self._threads = factory.Gauge(
            "loraretriever_threads", "Threads that the native engine computes with; fewer while others take the cores"
        )
        self._step_age = factory.Gauge(
            "loraretriever_step_age_seconds", "Duration so far of the step or command in progress"
        )
        self._missing_kernels = factory.Gauge(
            "loraretriever_missing_kernels", "Compiled CPU kernels that are missing and replaced by torch"
        )
        self._queue_s = factory.Histogram("loraretriever_queue_seconds", "Time in the engine's queue", SECONDS)
        self._load_s = factory.Histogram(
            "loraretriever_cold_load_seconds",
            "Time to load weights into host memory, by source",
            SHORT_SECONDS,
            ("level",),
        )
        self._failed_loads = factory.Counter(
            "loraretriever_cold_load_failures_total", "Weights that could not be loaded"
        )

    def waited(self, seconds: float) -> None:
        """Record the queueing time of a request that left the engine's queue."""
        self._queue_s.observe(seconds)

    def loaded(self, weights_digest: str, level: str, seconds: float) -> None:
        """Record a load of weights from `disk` or from the `store`."""
        self._load_s.observe(seconds, {"level": level})
        self._hits.inc(1, {"level": level})
        self._remember(weights_digest, level, seconds)

    def load_failed(self, weights_digest: str, seconds: float) -> None:
        """Record a failed load."""
        self._failed_loads.inc()
        self._remember(weights_digest, "", seconds)

    def _remember(self, weights_digest: str, source: str, seconds: float) -> None:
        now_ns = time.time_ns()
        self.loads.pop(weights_digest, None)
        self.loads[weights_digest] = Load(source, now_ns - int(seconds * 1e9), now_ns)
        if len(self.loads) > _MAX_LOADS:
            self.loads.popitem(last=False)

    def report_step_age(self, seconds: float) -> None:
        """Report the duration of the engine's step or command in progress; 0 when idle."""
        self._step_age.set(seconds)

    def report_missing_kernels(self, count: int) -> None:
        """Report how many compiled kernels this worker runs without."""
        self._missing_kernels.set(count)

    def report_status(self, status: EngineStatus) -> None:
        """Report the engine's status, and its counters since the last call."""
        self._running.set(status.num_running)
        self._waiting.set(status.num_waiting)
        self._bank.set(status.active_rows, {"state": "active"})
        self._bank.set(status.occupied_rows - status.active_rows, {"state": "idle"})
        self._bank.set(self._bank_rank_rows - status.occupied_rows, {"state": "free"})
        self._host_bytes.set(status.host_cache_bytes)
        self._free_kv.set(status.free_kv_rows)
        self._free_kv_tokens.set(status.free_kv_tokens)
        self._kv_tokens.set(status.kv_tokens)
        self._prefix_tokens.set(status.prefix_cache_tokens)
        self._threads.set(status.num_threads)
        self._resident.set(len(status.resident))
        self._count(status.counters)

    def _count(self, counters: Counters) -> None:
        for field in fields(counters):
            metric = COUNTER_METRICS[field.name]
            more = getattr(counters, field.name) - getattr(self._last, field.name)
            if metric is not None and more > 0:
                name, labels, _ = metric
                self._counters[name].inc(more, dict(labels))
        self._last = counters


class JobTrace:
    """The spans and the log line of a job, made when it ends: the steps of a stream may run in other contexts.

    Attributes have OpenTelemetry's names for generative models where it has one.
    """

    def __init__(self, job: Job, loads: Mapping[str, Load]) -> None:
        """`loads`: of the weights of all jobs, which may share one."""
        self._job, self._context, self._began_ns = job, context.get_current(), time.time_ns()
        self._loads = loads
        self._began, self._first_ns = time.monotonic(), 0

    def answered(self) -> None:
        """Note that a delta has arrived: the first one ends the computation of the prompt."""
        self._first_ns = self._first_ns or time.time_ns()

    def end(self, last: Delta | None) -> None:
        """Create the spans and log the job. `last`: the latest delta, None if the job had none."""
        now_ns = time.time_ns()
        started_ns = now_ns if last is None else min(self._began_ns + int(last.queued_s * 1e9), now_ns)
        first_ns = now_ns if last is None else min(max(self._first_ns, started_ns), now_ns)
        self._span("worker.queue", self._began_ns, started_ns, {})
        for row in self._job.plan.adapters:
            load = self._loads.get(row.weights_digest)
            if load is not None and load.ended_ns > self._began_ns and load.began_ns < first_ns:
                how = {"loraretriever.source": load.source} if load.source else {"error.type": "AdapterLoadFailed"}
                began_ns, ended_ns = max(load.began_ns, self._began_ns), min(load.ended_ns, first_ns)
                of_one: dict[str, AttributeValue] = {"loraretriever.adapters": [row.ref.short_digest], **how}
                self._span("worker.load", began_ns, ended_ns, of_one)
        if last is not None:
            read: dict[str, AttributeValue] = {
                "gen_ai.usage.input_tokens": last.num_prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": last.num_cached_tokens,
            }
            written: dict[str, AttributeValue] = {
                "gen_ai.usage.output_tokens": last.num_new_tokens,
                "gen_ai.response.finish_reasons": [] if last.finish_reason is None else [last.finish_reason],
            }
            self._span("worker.prefill", started_ns, first_ns, read)
            self._span("worker.decode", first_ns, now_ns, written)
        queued_s, num_new_tokens = (0.0, 0) if last is None else (last.queued_s, last.num_new_tokens)
        ended = "early" if last is None or last.finish_reason is None else last.finish_reason
        text, seconds = "job %s ended (%s) after %.4f s: %d tokens, queued %.3f s", time.monotonic() - self._began
        logger.info(text, self._job.request_id, ended, seconds, num_new_tokens, queued_s)

    def _span(self, name: str, began_ns: int, ended_ns: int, more: Mapping[str, AttributeValue]) -> None:
        operation = "chat" if isinstance(self._job.prompt, tuple) else "text_completion"
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": operation,
            "loraretriever.request_id": self._job.request_id,
            "loraretriever.strategy": self._job.plan.strategy,
            "loraretriever.adapters": [row.ref.short_digest for row in self._job.plan.adapters],
            **more,
        }
        tracer.start_span(name, self._context, start_time=began_ns, attributes=attributes).end(ended_ns)
