"""Counters of an engine since its start."""

from __future__ import annotations

from collections.abc import Collection, Container
from dataclasses import dataclass, replace


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
