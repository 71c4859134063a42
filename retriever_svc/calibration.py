"""Judge how well a prompt fits an adapter, so that the base model answers when none fits.

A cosine means something different for each prompt: some prompts lie near everything. So the score s of an adapter is
compared with the *nearness* n of the same prompt to ordinary prompts (see `ordinary_prompts`). Both are cosines to the
mean of a few texts, so the *margin* s − n says how near the prompt is to the adapter, compared with what people usually
ask an assistant. An operating point is the least margin with which an adapter answers. It is negative, because n is of
the nearest of many ordinary prompts. Two rules limit what an adapter can draw:

- The adapter's own samples are a loose floor: a score below a fraction of their typical score fits no adapter.
- An adapter whose own vector is near ordinary prompts must be nearer to the prompt by a *handicap*. Without it, many
  adapters with a few ordinary prompts each as samples would answer half of all everyday prompts together. Adapters
  whose samples are words are nearer to bare words, so these have a handicap of their own.

An adapter of a single text, such as a description, answers with a slightly smaller margin: a prompt is less near to
one text than to the mean of several.

The *confidence* of a candidate is the probability that it is the right adapter. It grows with the margin up to a bound,
beyond which only the lead over the other candidates of the prompt says more:

    confidence = 1 / (1 + exp(−(a + b · min(margin − handicap, bound) + c · lead)))

Margins and coefficients are constants, chosen on the `tune` pools of `python -m benchmarks.routing.wording`, which the
default encoder was not trained on. So no adapter of a pool can move the threshold of another. They hold for any
encoder: without a projection vectors are compared from the mean of the ordinary prompts (see `ordinary_prompts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Abstain = Literal["never", "lenient", "balanced", "strict"]
Floats = NDArray[np.float64]
# The least margin s − n. On the tune pools 10, 5 and 0.4 % of everyday prompts reach it, and 72, 55 and 20 % of the
# prompts of neighbouring tasks.
MARGINS: dict[Abstain, float] = {"never": -2.0, "lenient": -0.24, "balanced": -0.16, "strict": 0.0}
NO_THRESHOLD = -1.0  # the lowest possible cosine
_FLOOR_SHARE = 0.3  # of the mean score of an adapter's own samples
# The handicap grows from 0 to its largest between these nearnesses of an adapter to ordinary prompts. Adapters of tasks
# have 0.3 to 0.67, a few of programming 0.75, and means of 1 to 150 ordinary prompts have 0.65 to 0.9.
_NEAR, _VERY_NEAR, _MAX_HANDICAP = 0.65, 0.76, 0.2
# The same for bare words. On the tune pools adapters of words, such as verbs, have up to 0.77, and means of 1 to 3
# everyday words 0.7 to 1.
_NEAR_WORDS, _VERY_NEAR_WORDS = 0.82, 0.9
_SINGLE_TEXT = 0.02  # by which the margin of an adapter of one text may be smaller
_CONSTANT, _MARGIN_WEIGHT, _LEAD_WEIGHT = 2.18, 20.4, 18.4  # a, b and c, if half of the prompts are everyday ones
_MAX_MARGIN = -0.15  # the bound of the margin in the confidence
_MAX_LEAD = 0.3  # a larger lead says nothing more; that of the only candidate


def leave_one_out_scores(vectors: np.ndarray, means_of: np.ndarray | None = None) -> NDArray[np.float32]:
    """Return the cosine of each row (n, D) to the mean of the other rows: (n,), or (0,) for fewer than two rows.

    `means_of` (n, D): the rows that the means are of, if they are others than those which are compared.
    """
    rows = np.asarray(vectors, np.float64)
    averaged = rows if means_of is None else np.asarray(means_of, np.float64)
    if len(rows) < 2:
        return np.empty(0, np.float32)
    others = averaged.sum(axis=0) - averaged  # proportional to the mean of the others; a cosine ignores the length
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(others, axis=1)
    scores = np.sum(rows * others, axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny)
    return np.asarray(scores, np.float32)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The C candidates of one prompt."""

    scores: Floats  # (C,) their cosines to the prompt
    own_scores: Sequence[np.ndarray]  # of each one's samples, as `leave_one_out_scores` returns them
    nearness: Floats  # (C,) of their vectors to ordinary prompts that are no bare words
    word_nearness: Floats  # (C,) of their vectors to bare words


@dataclass(frozen=True, slots=True)
class Judgement:
    """The thresholds and confidences of candidates, both (C,)."""

    thresholds: Floats
    confidences: Floats


def least_threshold(abstain: Abstain, nearness: float) -> float:
    """Return a score that no threshold of a prompt with this nearness to ordinary prompts is below."""
    return nearness + MARGINS[abstain] - _SINGLE_TEXT


def judge(candidates: Candidates, abstain: Abstain, nearness: float) -> Judgement:
    """Judge the candidates of a prompt with this nearness to ordinary prompts."""
    scores = candidates.scores
    handicaps = np.maximum(
        _handicaps(candidates.nearness, _NEAR, _VERY_NEAR),
        _handicaps(candidates.word_nearness, _NEAR_WORDS, _VERY_NEAR_WORDS),
    )
    margins = np.minimum(scores - nearness - handicaps, _MAX_MARGIN)
    logits = _CONSTANT + _MARGIN_WEIGHT * margins + _LEAD_WEIGHT * _leads(scores)
    confidences = 1 / (1 + np.exp(-logits))
    if abstain == "never":
        return Judgement(np.full(len(scores), NO_THRESHOLD), confidences)
    floors = [_FLOOR_SHARE * own.mean() if len(own) else NO_THRESHOLD for own in candidates.own_scores]
    reliefs = np.asarray([_SINGLE_TEXT * (len(own) == 0) for own in candidates.own_scores])
    thresholds = np.maximum(nearness + MARGINS[abstain] + handicaps - reliefs, np.asarray(floors, np.float64))
    return Judgement(thresholds.clip(-1, 1), confidences)


def _handicaps(nearness: Floats, near: float, very_near: float) -> Floats:
    handicaps: Floats = _MAX_HANDICAP * ((nearness - near) / (very_near - near)).clip(0, 1)
    return handicaps


def _leads(scores: Floats) -> Floats:
    """Return by how much each score is above the best of the others: (C,)."""
    if len(scores) < 2:
        return np.full(len(scores), _MAX_LEAD)
    second, first = np.sort(scores)[-2:]
    leads: Floats = np.where(scores == first, first - second, scores - first)
    return leads.clip(-_MAX_LEAD, _MAX_LEAD)
