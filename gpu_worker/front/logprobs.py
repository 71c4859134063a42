"""Log probabilities of chosen tokens, for rows that request them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_LEAST = -9999.0  # replaces -inf, which JSON cannot represent


@dataclass(frozen=True, slots=True)
class Scored:
    """The log probability of a token, and (id, log probability) of the most likely ids, best first.

    `rank`: the token's place among all ids, from 1, for tokens of a prompt; otherwise 0.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]
    rank: int = 0

    @classmethod
    def of(cls, logprob: float, ids: Iterable[float], logprobs: Iterable[float]) -> Scored:
        """Make the score, replacing -inf by -9999."""
        top = tuple((int(i), max(value, _LEAST)) for i, value in zip(ids, logprobs, strict=True))
        return cls(max(logprob, _LEAST), top)
