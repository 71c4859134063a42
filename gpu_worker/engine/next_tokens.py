"""Choose the next token of every row that has logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gpu_worker.engine.row import Row
from gpu_worker.engine.scheduler import Scheduled
from gpu_worker.sampling.logprobs import Scored
from gpu_worker.sampling.sampling import Sampler


@dataclass(frozen=True, slots=True)
class Chosen:
    """The rows whose last token was computed, with logits, next token and score for each."""

    rows: list[Row]
    logits: Tensor  # (rows, V)
    tokens: list[int | None]  # None: the logits are not finite
    scores: list[Scored | None]  # None: not requested


def choose(part: Sequence[Scheduled], logits: Tensor, sampler: Sampler) -> Chosen:
    """Choose the next token of each row that has logits, and score it if the request wants log probabilities.

    Dims: logits (rows of `part` whose last token was computed, V).
    """
    rows = [row for row, segment in part if segment.total_len == len(row.tokens)]
    tokens, scores = sampler(logits, [row.draw() for row in rows])
    return Chosen(rows, logits, tokens, scores)
