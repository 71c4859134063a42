"""Limit how much companions may change the answer of the best adapter.

Companions found by similar inputs may have another function. At equal weights they cost two fifths of the right answers
(benchmarks/paper/REPORT.md); what counts is the ratio of the best adapter's weight to that of all others together.
"""

from __future__ import annotations

from collections.abc import Sequence

MIN_LEAD = 3.0  # weight of the best adapter : total weight of the companions
CLOSE_SCORES = 0.05  # an adapter whose score is at most this much lower may share the lead


def limited_weights(weights: Sequence[float], shares_lead: Sequence[bool], min_lead: float = MIN_LEAD) -> list[float]:
    """Return the weights with the companions limited; the sum stays the same.

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
