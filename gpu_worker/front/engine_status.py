"""A snapshot of an engine's state, and the counters since its start."""

from __future__ import annotations

from collections.abc import Collection, Container
from dataclasses import dataclass, field, replace


@dataclass(slots=True)
class Counters:
    """Monotonic counters, updated by the engine's thread. Rates are differences of two readings.

    Each adapter of a request counts once, at submission: as a bank hit, as a host hit (cached or being loaded), or as a
    fetch. Probes of published adapters are not counted as requests.
    """

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    num_bank_hits: int = 0
    num_host_hits: int = 0
    num_fetches: int = 0
    num_cached_tokens: int = 0  # prompt tokens that were found in the prefix cache
    num_evicted_blocks: int = 0  # blocks that the prefix cache gave up for others
    num_preemptions: int = 0  # rows that gave up their KV and recompute it
    num_steps: int = 0
    step_s: float = 0.0  # total time of the steps

    def count_request(self, digests: Collection[str], bank: Container[str], host: Container[str]) -> None:
        """Count a request with these adapters."""
        self.num_requests += 1
        for digest in digests:
            if digest in bank:
                self.num_bank_hits += 1
            elif digest in host:
                self.num_host_hits += 1
            else:
                self.num_fetches += 1

    def copy(self) -> Counters:
        """Return a copy of the current values."""
        return replace(self)


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
    prefix_cache_tokens: int = field(default=0, compare=False)  # tokens in the prefix cache, in use or kept
    num_threads: int = field(default=0, compare=False)  # that compute; fewer while other processes take the cores
    counters: Counters = field(default_factory=Counters, compare=False)  # monotonic
