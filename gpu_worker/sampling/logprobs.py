"""Log probabilities of chosen tokens, for the rows that ask for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_LEAST = -9999.0  # for what is impossible: JSON has no infinity


@dataclass(frozen=True, slots=True)
class Scored:
    """The log probability of a row's token, and (id, log probability) of the likeliest ids, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, logprob: float, ids: Iterable[float], logprobs: Iterable[float]) -> Scored:
        """Return the score of these numbers, with -9999 in place of -inf."""
        top = tuple((int(i), max(value, _LEAST)) for i, value in zip(ids, logprobs, strict=True))
        return cls(max(logprob, _LEAST), top)
