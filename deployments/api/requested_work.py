"""How much work a request asks for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Work:
    """How much a request asks for. The fields name what an error message should point at."""

    num_rows: int = 1  # prompts × n
    num_tokens: int = 0  # of prompts, once each, and the most new ones: settled by what was used
    num_read: int = 0  # by the encoder: charged once the request is let in, whatever becomes of it
    rows_field: str = "prompt"
    tokens_field: str = "prompt"

    @property
    def reserved(self) -> int:
        return self.num_tokens + self.num_read
