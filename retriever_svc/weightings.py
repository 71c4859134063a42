"""Weightings: the ways to turn the scores of retrieved adapters into weights. `WEIGHTINGS` lists them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from retriever_svc.index import Match
from retriever_svc.output_profile import functions_agree

MIN_LEAD = 3.0  # weight of the best adapter : total weight of the companions
CLOSE_SCORES = 0.05  # an adapter whose score is at most this much lower may share the lead
_LEAST_SHARE = 0.02  # of the best adapter's weight; a companion with less changes nothing and takes a slot of the bank


@dataclass(frozen=True, slots=True)
class WeightingMethod:
    """One way to turn scores s into weights. `summary`: the weights.

    `weigh` gets matches, best first, the caller and the temperature T. It returns a weight for each match, with the sum
    1; 0 leaves one out.
    """

    name: str
    summary: str
    weigh: Callable[[Sequence[Match], str, float], list[float]]


def _weigh_by_scores(matches: Sequence[Match], caller: str, temperature: float) -> list[float]:
    """Return w_i = exp(s_i / T) / Σ_j exp(s_j / T)."""
    parts = [math.exp((match.score - matches[0].score) / temperature) for match in matches]
    return [part / sum(parts) for part in parts]


def _weigh_by_evidence(matches: Sequence[Match], caller: str, temperature: float) -> list[float]:
    """Return weights by scores, with the companions of the best adapter limited as in `limited_weights`.

    Those that score close to it, whose sample outputs show the same function, and that are of the best adapter's owner
    or of the caller are not limited.
    """
    lowest = matches[0].score + temperature * math.log(_LEAST_SHARE)
    kept = [match for match in matches if match.score >= lowest]
    weights = _weigh_by_scores(kept, caller, temperature)
    limited = iter(limited_weights(weights, [_shares_lead(match, matches[0], caller) for match in kept]))
    return [next(limited) if match.score >= lowest else 0.0 for match in matches]


def _shares_lead(match: Match, best: Match, caller: str) -> bool:
    """Return whether the match may weigh as much as the best one.

    The outputs of samples do not bind an adapter's weights. So copies of another owner's samples never share the lead.
    """
    first, other = best.record.embedding, match.record.embedding
    if first is None or other is None or best.score - match.score > CLOSE_SCORES:
        return False
    if match.record.ref.tenant not in (best.record.ref.tenant, caller):
        return False
    return functions_agree(first.outputs, other.outputs)


def limited_weights(weights: Sequence[float], shares_lead: Sequence[bool], min_lead: float = MIN_LEAD) -> list[float]:
    """Return the weights with the companions limited; the sum stays the same.

    Companions found by similar inputs may have another function. At equal weights they cost two fifths of the right
    answers (benchmarks/paper/REPORT.md).
    `weights`: positive, that of the best adapter first. `shares_lead`: whether an adapter does the same as the best one
    and scores close to it; such an adapter is not limited. The others, C, get
    w_i · min(1, w_0 / (min_lead · Σ_{j ∈ C} w_j)).
    """
    companions = sum(w for w, shares in zip(weights[1:], shares_lead[1:], strict=True) if not shares)
    factor = 1.0 if companions == 0 else min(1.0, weights[0] / (min_lead * companions))
    limited = [
        w if place == 0 or shares else w * factor
        for place, (w, shares) in enumerate(zip(weights, shares_lead, strict=True))
    ]
    scale = sum(weights) / sum(limited)
    return [w * scale for w in limited]


WEIGHTINGS = {
    weighting.name: weighting
    for weighting in (
        WeightingMethod(
            "evidence",
            "softmax without companions of less than 2 % of the best adapter's weight; the others together get at most"
            " a third of it",
            _weigh_by_evidence,
        ),
        WeightingMethod("uniform", "1/n each, as in the paper", lambda matches, *_: [1 / len(matches)] * len(matches)),
        WeightingMethod("softmax", "exp(s / T), scaled to the sum 1", _weigh_by_scores),
    )
}
if TYPE_CHECKING:
    Weighting = str
else:  # the names, for what reads annotations at run time
    Weighting = Literal[tuple(WEIGHTINGS)]
