"""Count the rows that vLLM computes. Its own scheduler places their keys and values."""

from __future__ import annotations

from gpu_worker.front.prefix import Prefix


class RowPlaces:
    """As many places as vLLM's batch has rows. `num_freed`: rows freed since the start."""

    def __init__(self, num_places: int) -> None:
        self.num_places, self.num_free, self.num_freed = num_places, num_places, 0

    def is_coming(self, num_tokens: int, prefix: Prefix | None) -> bool:
        return False

    def fits(self, num_tokens: int, prefix: Prefix | None) -> bool:
        return self.num_free > 0

    def allocate(self, num_tokens: int, longest_len: int, prefix: Prefix | None) -> int:
        self.num_free -= 1
        return 0

    def free(self) -> None:
        self.num_free += 1
        self.num_freed += 1
