"""A snapshot of an engine's state."""

from __future__ import annotations

from dataclasses import dataclass, field

from gpu_worker.front.counters import Counters


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """The state of an engine. Every field that is compared returns to its idle value once all requests have ended."""

    resident: frozenset[str]  # weights digests of the adapters in the bank
    occupied_rows: int  # bank rows they occupy
    active_rows: int  # bank rows that running requests read
    num_running: int
    num_waiting: int
    free_kv_rows: int
    free_kv_tokens: int
    kv_tokens: int  # tokens of running requests in the KV cache
    host_cache_bytes: int
    num_forgetting: int  # weights to drop when their last request ends
    waiting_tokens: int = 0  # prompt tokens and maximum new tokens of waiting requests
    disk_cache_bytes: int = 0  # of the machine; its workers share one cache
    prefix_cache_tokens: int = field(default=0, compare=False)  # tokens in the prefix cache, in use or kept
    num_threads: int = field(default=0, compare=False)  # that compute; fewer while other processes take the cores
    counters: Counters = field(default_factory=Counters, compare=False)  # monotonic
