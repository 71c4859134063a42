"""A Worker replica's figures: read from the engine once a beat, never by its thread."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields

from deployments.observability.metrics import OTHER, SECONDS, SERVE, SHORT_SECONDS, MetricFactory
from gpu_worker.engine.counters import Counters
from gpu_worker.engine.engine_status import EngineStatus

_MAX_NAMED = 64  # adapters that a replica names; the others are one number
_DIGEST_CHARS = 12
# Of each of the engine's counters: name, labels, meaning. Where the weights that it fetches came from, `loaded` tells.
COUNTED: dict[str, tuple[str, dict[str, str], str] | None] = {
    "num_requests": ("loraretriever_jobs_total", {}, "Requests the engine was given"),
    "num_prompt_tokens": ("loraretriever_prompt_tokens_total", {}, "Prompt tokens computed"),
    "num_new_tokens": ("loraretriever_new_tokens_total", {}, "Tokens generated"),
    "num_bank_hits": ("loraretriever_adapter_hits_total", {"level": "bank"}, "Where a request's adapters were found"),
    "num_host_hits": ("loraretriever_adapter_hits_total", {"level": "host"}, "Where a request's adapters were found"),
    "num_fetches": None,
    "num_preemptions": ("loraretriever_preemptions_total", {}, "Rows that gave their KV back and compute it again"),
    "num_steps": ("loraretriever_steps_total", {}, "Steps of the engine"),
    "step_s": ("loraretriever_step_seconds_total", {}, "Seconds the engine spent in steps"),
}
_LABELS = {"loraretriever_adapter_hits_total": ("level",)}


class WorkerMetrics:
    """`bank_rank_rows`: how many the bank has."""

    def __init__(self, bank_rank_rows: int, kinds: MetricFactory = SERVE) -> None:
        self._bank_rank_rows = bank_rank_rows
        self._last = Counters()
        told = {counted[0]: counted[2] for counted in COUNTED.values() if counted is not None}
        self._counters = {name: kinds.Counter(name, text, _LABELS.get(name, ())) for name, text in told.items()}
        self._hits = self._counters["loraretriever_adapter_hits_total"]
        self._running = kinds.Gauge("loraretriever_running_rows", "Requests that run in the batch")
        self._waiting = kinds.Gauge("loraretriever_waiting_rows", "Requests in the engine's queue")
        self._bank = kinds.Gauge("loraretriever_bank_rows", "Rank rows of the bank: active, idle, free", ("state",))
        self._resident = kinds.Gauge(
            "loraretriever_resident_adapters", "Adapters in the bank, by the digest of their weights", ("adapter",)
        )
        self._host_bytes = kinds.Gauge("loraretriever_host_cache_bytes", "Weights kept in host memory")
        self._free_kv = kinds.Gauge("loraretriever_kv_free_rows", "Rows of the KV cache that no request holds")
        self._free_kv_tokens = kinds.Gauge("loraretriever_kv_free_tokens", "Tokens the KV cache still has room for")
        self._kv_tokens = kinds.Gauge("loraretriever_kv_tokens", "Tokens whose keys and values are held")
        self._step_age = kinds.Gauge(
            "loraretriever_step_age_seconds", "How long the step or command in progress has run"
        )
        self._missing_kernels = kinds.Gauge(
            "loraretriever_missing_kernels", "Compiled CPU kernels that torch stands in for"
        )
        self._queue_s = kinds.Histogram("loraretriever_queue_seconds", "Wait in the engine's queue", SECONDS)
        self._load_s = kinds.Histogram(
            "loraretriever_cold_load_seconds", "Bringing weights to host memory, by source", SHORT_SECONDS, ("level",)
        )
        self._failed_loads = kinds.Counter("loraretriever_cold_load_failures_total", "Weights that could not be had")

    def waited(self, seconds: float) -> None:
        """A request has left the engine's queue."""
        self._queue_s.observe(seconds)

    def loaded(self, level: str, seconds: float) -> None:
        """Weights came from `disk` or from the `store`."""
        self._load_s.observe(seconds, {"level": level})
        self._hits.inc(1, {"level": level})

    def load_failed(self) -> None:
        self._failed_loads.inc()

    def stepping(self, seconds: float) -> None:
        """Report how long the engine's step or command in progress has run; 0 while it has nothing to do."""
        self._step_age.set(seconds)

    def missing_kernels(self, count: int) -> None:
        """Report how many compiled kernels this worker runs without."""
        self._missing_kernels.set(count)

    def hold(self, held: EngineStatus) -> None:
        """Tell what the engine holds, and what it did since the last call."""
        self._running.set(held.num_running)
        self._waiting.set(held.num_waiting)
        self._bank.set(held.active_rows, {"state": "active"})
        self._bank.set(held.occupied_rows - held.active_rows, {"state": "idle"})
        self._bank.set(self._bank_rank_rows - held.occupied_rows, {"state": "free"})
        self._host_bytes.set(held.host_cache_bytes)
        self._free_kv.set(held.free_kv_rows)
        self._free_kv_tokens.set(held.free_kv_tokens)
        self._kv_tokens.set(held.kv_tokens)
        self._name_resident(held.resident)
        self._count(held.counters)

    def _name_resident(self, digests: Collection[str]) -> None:
        named = sorted(digests)[:_MAX_NAMED]
        for digest in named:
            self._resident.set(1, {"adapter": digest[:_DIGEST_CHARS]})
        self._resident.set(len(digests) - len(named), {"adapter": OTHER})

    def _count(self, counters: Counters) -> None:
        for field in fields(counters):
            counted = COUNTED[field.name]
            more = getattr(counters, field.name) - getattr(self._last, field.name)
            if counted is not None and more > 0:
                name, labels, _ = counted
                self._counters[name].inc(more, dict(labels))
        self._last = counters
