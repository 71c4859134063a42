"""Choose the next token of every row that has logits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from gpu_worker.front.grammar.state import GrammarState, Mask
from gpu_worker.front.logprobs import Scored
from gpu_worker.front.row import Row
from gpu_worker.native.sampling.sampling import Sampler
from gpu_worker.native.scheduler import Scheduled

Choice = tuple[int | None, Scored | None, Tensor | None]
"""A token, its score, and the logits (V,) it was chosen from. A token of a grammar's run has neither."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The rows whose last token was computed, with logits, next token and score for each.

    A row with guesses is there once for its last token and once for each guess, in order, or for its last guess only if
    the others are known to be right. `aheads`: the guesses before each token.
    `prompts`: the rows of which tokens of the prompt were scored, with the scores.
    """

    rows: list[Row]
    aheads: list[int]
    logits: Tensor  # (rows, V)
    tokens: list[int | None]  # None: see `Row.failure`
    scores: list[Scored | None]  # None: not requested
    prompts: list[tuple[Row, list[Scored | None]]] = field(default_factory=list)  # None: see `Sampler.score`

    def by_row(self) -> Iterator[tuple[Row, list[Choice]]]:
        """Yield each row with its tokens, their scores and logits (V,), guesses that are known to be right first."""
        taken = zip(self.rows, self.aheads, zip(self.tokens, self.scores, self.logits, strict=True), strict=True)
        for row, own in itertools.groupby(taken, key=lambda taken: taken[0]):
            (_, ahead, choice), *others = own
            is_sound = choice[0] is not None  # a run's own logits are not computed; its row must fail here
            known: list[Choice] = [(token, None, None) for token in row.guess[:ahead] if is_sound]
            yield row, [*known, choice, *(choice for _, _, choice in others)]


def choose(part: Sequence[Scheduled], logits: Tensor, sampler: Sampler) -> Chosen:
    """Choose the next token of each row that has logits, and score it if the request wants log probabilities.

    Dims: logits (K, V), first those of the rows of `part` whose last token was computed: see `ForwardPass`.
    """
    places = _places_with_logits(part)
    rows, aheads = [row for row, _ in places], [ahead for _, ahead in places]
    prompts: list[tuple[Row, list[Scored | None]]] = []
    if len(logits) > len(rows):
        prompts, logits = _scored_prompts(part, logits[len(rows) :], sampler), logits[: len(rows)]
    tokens, scores = sampler(logits, [row.draw(ahead) for row, ahead in places])
    tokens = [None if _has_failed_grammar(row) else token for row, token in zip(rows, tokens, strict=True)]
    return Chosen(rows, aheads, logits, tokens, scores, prompts)


def _scored_prompts(
    part: Sequence[Scheduled], logits: Tensor, sampler: Sampler
) -> list[tuple[Row, list[Scored | None]]]:
    """Return the scores of the prompt tokens of this step by row. Dims: logits (tokens to score, V), in order."""
    positions = [(row, row.positions_to_score(segment.context_len, segment.total_len)) for row, segment in part]
    tokens = [row.tokens[position + 1] for row, own in positions for position in own]
    counts = [row.sampling.prompt_logprobs or 0 for row, own in positions for _ in own]
    scores = iter(sampler.score(logits, tokens, counts))
    return [(row, [next(scores) for _ in own]) for row, own in positions if own]


def find_grammars(part: Sequence[Scheduled]) -> list[GrammarState]:
    """Return the grammars of the rows whose last token is computed in this step."""
    return [row.grammar for row, _ in _places_with_logits(part) if row.grammar is not None]


def find_masks(part: Sequence[Scheduled], finish: Callable[[], None]) -> list[Mask | None]:
    """Return the masks of the rows with logits, after `finish` has completed them.

    None for a row all of whose logits are read: log probabilities are those before the mask.
    """
    finish()
    draws = [(row, row.draw(ahead)) for row, ahead in _places_with_logits(part)]
    reads_all = [row.captures_next_logits or draw.params.logprobs is not None for row, draw in draws]
    return [None if every else draw.allowed for every, (_, draw) in zip(reads_all, draws, strict=True)]


def _has_failed_grammar(row: Row) -> bool:
    return row.grammar is not None and row.grammar.error is not None


def _places_with_logits(part: Sequence[Scheduled]) -> list[tuple[Row, int]]:
    """Return each row with the number of its guesses before the token to choose."""
    return [(row, ahead) for row, segment in part for ahead in row.choices(segment.total_len)]
