"""Choose the next token of every row that has logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gpu_worker.engine.row import Row
from gpu_worker.engine.scheduler import Scheduled
from gpu_worker.errors import GrammarFailed, LogitsNotFinite
from gpu_worker.grammar.state import GrammarState
from gpu_worker.sampling.logprobs import Scored
from gpu_worker.sampling.sampling import Sampler


@dataclass(frozen=True, slots=True)
class Chosen:
    """The rows whose last token was computed, with logits, next token and score for each."""

    rows: list[Row]
    logits: Tensor  # (rows, V)
    tokens: list[int | None]  # None: see `failure_of`
    scores: list[Scored | None]  # None: not requested


def choose(part: Sequence[Scheduled], logits: Tensor, sampler: Sampler) -> Chosen:
    """Choose the next token of each row that has logits, and score it if the request wants log probabilities.

    Dims: logits (rows of `part` whose last token was computed, V).
    """
    rows = _rows_with_logits(part)
    tokens, scores = sampler(logits, [row.draw() for row in rows])
    tokens = [None if _has_failed_grammar(row) else token for row, token in zip(rows, tokens, strict=True)]
    return Chosen(rows, logits, tokens, scores)


def grammars_of(part: Sequence[Scheduled]) -> list[GrammarState]:
    """Return the grammars of the rows whose last token is computed in this step."""
    return [row.grammar for row in _rows_with_logits(part) if row.grammar is not None]


def failure_of(row: Row) -> GrammarFailed | LogitsNotFinite:
    """Return why no token could be chosen for the row."""
    if row.grammar is not None and row.grammar.error is not None:
        return GrammarFailed(f"the grammar of request {row.request_id} cannot be followed: {row.grammar.error}")
    return LogitsNotFinite(
        f"request {row.request_id} produced non-finite logits; use smaller adapter weights or other adapters"
    )


def _has_failed_grammar(row: Row) -> bool:
    return row.grammar is not None and row.grammar.error is not None


def _rows_with_logits(part: Sequence[Scheduled]) -> list[Row]:
    return [row for row, segment in part if segment.total_len == len(row.tokens)]
