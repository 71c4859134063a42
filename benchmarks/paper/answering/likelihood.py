"""Choose among retrieved adapters by the model itself: the adapter whose answer it finds most likely.

score_i = (1 / n_i) Σ_t log p_i(y_t | y_<t, x), with y the greedy answer of n_i tokens under adapter i alone. Adapters
that are confident on every prompt are favoured, so the calibrated score is in standard deviations of the adapter's own
scores on reference prompts. Costs one answer for each candidate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from rich.console import Console

from benchmarks.paper.answering.answers import Asked, Asker, Question
from lora_store import Plan

_LEAST_SPREAD = 1e-3
_LEAST_PROMPTS = 3  # an adapter with fewer reference prompts has the spread of all


class Candidate(NamedTuple):
    """One adapter alone on one question."""

    plan: Plan
    text: str
    logprob: float

    @property
    def name(self) -> str:
        return self.plan.adapters[0].ref.name


def candidates_of(
    asker: Asker, questions: Sequence[Question], plans: Sequence[Plan], out: Console, name: str
) -> list[list[Candidate]]:
    """Return every adapter of each plan alone, in the plan's order. `asker` keeps log probabilities."""
    asked: list[Asked] = [
        (question, replace(plan, strategy="selection", adapters=(replace(adapter, weight=1.0),)))
        for question, plan in zip(questions, plans, strict=True)
        for adapter in plan.adapters
    ]
    texts = iter(asker.answers(asked, out, name))
    found = iter(Candidate(plan, next(texts), asker.logprob(question, plan)) for question, plan in asked)
    return [[next(found) for _ in plan.adapters] for plan in plans]


@dataclass(frozen=True, slots=True)
class Confidences:
    """Mean and spread of each adapter's log probabilities on reference prompts."""

    by_name: Mapping[str, tuple[float, float]]
    overall: tuple[float, float]

    @classmethod
    def of(cls, reference: Sequence[Sequence[Candidate]]) -> Confidences:
        found: dict[str, list[float]] = defaultdict(list)
        for candidates in reference:
            for candidate in candidates:
                if candidate.text:
                    found[candidate.name].append(candidate.logprob)
        every = [value for values in found.values() for value in values]
        spreads = {name: _moments(values) for name, values in found.items() if len(values) >= _LEAST_PROMPTS}
        return cls(spreads, _moments(every))

    def score(self, candidate: Candidate) -> float:
        mean, spread = self.by_name.get(candidate.name, self.overall)
        return (candidate.logprob - mean) / spread


def _moments(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), max(float(np.std(values)), _LEAST_SPREAD)


def most_likely(candidates: Sequence[Candidate], confidences: Confidences | None = None) -> int:
    """Return the place of the best candidate; of equal ones the first. `confidences`: calibrate by these."""
    scores = [c.logprob if confidences is None else confidences.score(c) for c in candidates]
    return max(range(len(scores)), key=lambda place: scores[place] if math.isfinite(scores[place]) else -math.inf)
