"""What an engine has done since it started."""

from __future__ import annotations

from collections.abc import Collection, Container
from dataclasses import dataclass, replace


@dataclass(slots=True)
class Counters:
    """Only ever rises: rates are differences of two readings. Kept by the thread that steps.

    Every adapter of every request counts once, as the request comes: it was in the bank, or in host memory (or on its
    way there for another request), or had to be fetched. Probes of what is published are no requests.
    """

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    num_bank_hits: int = 0
    num_host_hits: int = 0
    num_fetches: int = 0
    num_preemptions: int = 0  # a row gave its KV back to others, and computes it again
    num_steps: int = 0
    step_s: float = 0.0  # in those steps, together

    def count_request(self, digests: Collection[str], bank: Container[str], host: Container[str]) -> None:
        self.num_requests += 1
        for digest in digests:
            if digest in bank:
                self.num_bank_hits += 1
            elif digest in host:
                self.num_host_hits += 1
            else:
                self.num_fetches += 1

    def copy(self) -> Counters:
        """These numbers as they are now."""
        return replace(self)
