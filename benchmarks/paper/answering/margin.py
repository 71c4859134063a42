"""Choose mixture or selection for each question by the lead of the best score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from benchmarks.paper.answering.answers import Question
from benchmarks.paper.answering.methods import Routed
from benchmarks.paper.answering.runs import Bench
from lora_store import Plan
from retriever_svc import Retriever

MARGINS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True, slots=True)
class Rule:
    """Selects if the best cosine exceeds the second by `margin` or more; without `clear_selects`, if by less.

    A margin of 0 always selects, or always mixes.
    """

    margin: float
    clear_selects: bool

    def selects(self, lead: float) -> bool:
        return (lead >= self.margin) == self.clear_selects

    def __str__(self) -> str:
        if self.margin == 0:
            return "always select" if self.clear_selects else "always mix"
        return f"select if the lead is {'at least' if self.clear_selects else 'below'} {self.margin:g}, else mix"


RULES = tuple(Rule(margin, clear) for margin, clear in product(MARGINS, (True, False)))


@dataclass(frozen=True, slots=True)
class ByLead:
    """The mixture of the best three, or the best alone, as `rule` decides."""

    rule: Rule
    masks_own: bool = False

    def plans(self, retriever: Retriever, questions: Sequence[Question]) -> list[Plan]:
        alone = Routed("selection", 1, masks_own=self.masks_own).plans(retriever, questions)
        mixed = Routed("mixture", masks_own=self.masks_own).plans(retriever, questions)
        return [a if self.rule.selects(lead_of(b)) else b for a, b in zip(alone, mixed, strict=True)]


def lead_of(plan: Plan) -> float:
    """Return how much the best score exceeds the second; infinite if there is no second."""
    scores = [adapter.score or 0.0 for adapter in plan.adapters]
    return scores[0] - scores[1] if len(scores) > 1 else math.inf


def best_rule(leads: Sequence[float], selection: Sequence[float], mixture: Sequence[float]) -> Rule:
    """Return the rule with the highest mean score; of equal ones the first of RULES. Inputs: one entry per question."""
    alone, mixed = np.array(selection), np.array(mixture)

    def mean(rule: Rule) -> float:
        return float(np.where([rule.selects(lead) for lead in leads], alone, mixed).mean())

    return max(RULES, key=mean)


def chosen_rule(bench: Bench, per_task: int, *, masks_own: bool) -> Rule:
    """Return the best rule on the choice part."""
    ways = {"selection": Routed("selection", 1, masks_own=masks_own), "mixture": Routed("mixture", masks_own=masks_own)}
    scores = {
        name: bench.run(f"{name} on the choice part", way, per_task, "choice")["score"].to_pylist()
        for name, way in ways.items()
    }
    plans = ways["mixture"].plans(bench.retriever, bench.study.questions("choice", per_task))
    return best_rule([lead_of(plan) for plan in plans], scores["selection"], scores["mixture"])
