"""Log probabilities of chosen tokens, for the rows that ask for them and at the cost of nobody else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

_LEAST = -9999.0  # for what is impossible: JSON has no infinity


@dataclass(frozen=True, slots=True)
class Scored:
    """The log probability of a row's token, and (id, log probability) of the likeliest ids, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


def score(logits: Tensor, tokens: Sequence[int | None], wanted: Sequence[int | None]) -> list[Scored | None]:
    """One entry a row, None where nothing is wanted or no token was chosen. Dims: logits (B, V), the model's own.

    `wanted`: how many of the likeliest ids to tell, 0 for the token alone.
    """
    return [
        None if token is None or count is None else _score_row(logits[row], token, count)
        for row, (token, count) in enumerate(zip(tokens, wanted, strict=True))
    ]


def _score_row(logits: Tensor, token: int, count: int) -> Scored:
    logprobs = logits.float().log_softmax(dim=-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    top = tuple((token_id, max(value, _LEAST)) for token_id, value in zip(ids.tolist(), values.tolist(), strict=True))
    return Scored(max(float(logprobs[token]), _LEAST), top)
