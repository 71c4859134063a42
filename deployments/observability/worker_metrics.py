"""Metrics of a Worker replica, read from the engine at intervals and never by its own thread."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields

from deployments.observability.metrics import OTHER, SECONDS, SERVE, SHORT_SECONDS, MetricFactory
from gpu_worker.engine.counters import Counters
from gpu_worker.engine.engine_status import EngineStatus

_MAX_NAMED = 64  # adapters with a label of their own; the others share one
_DIGEST_CHARS = 12
# Name, labels and meaning of the metric of each engine counter. `loaded` counts fetches, by source.
COUNTER_METRICS: dict[str, tuple[str, dict[str, str], str] | None] = {
    "num_requests": ("loraretriever_engine_requests_total", {}, "Requests submitted to the engine"),
    "num_prompt_tokens": ("loraretriever_prompt_tokens_total", {}, "Prompt tokens computed"),
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
    "num_preemptions": ("loraretriever_preemptions_total", {}, "Rows whose KV cache was released to be computed again"),
    "num_steps": ("loraretriever_steps_total", {}, "Steps of the engine"),
    "step_s": ("loraretriever_step_seconds_total", {}, "Time spent in engine steps"),
}
_LABELS = {"loraretriever_adapter_hits_total": ("level",)}


class WorkerMetrics:
    """Reports an engine's status and counters. `bank_rank_rows`: the size of the bank."""

    def __init__(self, bank_rank_rows: int, factory: MetricFactory = SERVE) -> None:
        self._bank_rank_rows = bank_rank_rows
        self._last = Counters()
        texts = {metric[0]: metric[2] for metric in COUNTER_METRICS.values() if metric is not None}
        self._counters = {name: factory.Counter(name, text, _LABELS.get(name, ())) for name, text in texts.items()}
        self._hits = self._counters["loraretriever_adapter_hits_total"]
        self._running = factory.Gauge("loraretriever_running_rows", "Rows in the running batch")
        self._waiting = factory.Gauge("loraretriever_waiting_rows", "Rows in the engine's queue")
        self._bank = factory.Gauge(
            "loraretriever_bank_rows", "Rank rows of the bank by state: active, idle, free", ("state",)
        )
        self._resident = factory.Gauge(
            "loraretriever_resident_adapters", "Adapters in the bank, by digest", ("adapter",)
        )
        self._host_bytes = factory.Gauge("loraretriever_host_cache_bytes", "Adapter weights cached in host memory")
        self._free_kv = factory.Gauge("loraretriever_kv_free_rows", "Free rows of the KV cache")
        self._free_kv_tokens = factory.Gauge("loraretriever_kv_free_tokens", "Free tokens of the KV cache")
        self._kv_tokens = factory.Gauge("loraretriever_kv_tokens", "Used tokens of the KV cache")
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

    def loaded(self, level: str, seconds: float) -> None:
        """Record a load of weights from `disk` or from the `store`."""
        self._load_s.observe(seconds, {"level": level})
        self._hits.inc(1, {"level": level})

    def load_failed(self) -> None:
        """Count a failed load."""
        self._failed_loads.inc()

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
        self._name_resident(status.resident)
        self._count(status.counters)

    def _name_resident(self, digests: Collection[str]) -> None:
        named = sorted(digests)[:_MAX_NAMED]
        for digest in named:
            self._resident.set(1, {"adapter": digest[:_DIGEST_CHARS]})
        self._resident.set(len(digests) - len(named), {"adapter": OTHER})

    def _count(self, counters: Counters) -> None:
        for field in fields(counters):
            metric = COUNTER_METRICS[field.name]
            more = getattr(counters, field.name) - getattr(self._last, field.name)
            if metric is not None and more > 0:
                name, labels, _ = metric
                self._counters[name].inc(more, dict(labels))
        self._last = counters
