"""The choice of a margin by the scores that it would have given."""

from __future__ import annotations

import pytest

from benchmarks.paper.answering.margin import RULES, ByLead, Rule, best_rule, lead_of
from benchmarks.paper.answering.methods import Routed
from benchmarks.paper.answering.runs import Bench


def test_rules_without_a_margin_are_the_two_strategies() -> None:
    pure = [rule for rule in RULES if rule.margin == 0]
    assert [[rule.selects(lead) for lead in (0.0, 0.3)] for rule in pure] == [[True, True], [False, False]]
    assert [Rule(0.1, True).selects(lead) for lead in (0.05, 0.1)] == [False, True]
    assert [Rule(0.1, False).selects(lead) for lead in (0.05, 0.1)] == [True, False]


@pytest.mark.parametrize(
    ("selection", "mixture", "expected"),
    [
        ([1, 1, 1, 0], [1, 0, 0, 0], Rule(0.0, True)),
        ([0, 0, 0, 0], [1, 0, 0, 1], Rule(0.0, False)),
        ([0, 0, 1, 1], [1, 1, 0, 0], Rule(0.1, True)),
        ([1, 1, 0, 0], [0, 0, 1, 1], Rule(0.1, False)),
    ],
)
def test_the_best_rule_has_the_highest_score(selection: list[float], mixture: list[float], expected: Rule) -> None:
    assert best_rule([0.005, 0.07, 0.12, 0.15], selection, mixture) == expected


@pytest.mark.parametrize("masked", [False, True])
def test_the_lead_decides_which_strategy_plans(bench: Bench, masked: bool) -> None:
    questions = bench.study.questions("test", 6)
    mixed = Routed("mixture", masks_own=masked).plans(bench.retriever, questions)
    alone = Routed("selection", 1, masks_own=masked).plans(bench.retriever, questions)
    middle = sorted(lead_of(plan) for plan in mixed)[len(mixed) // 2]
    plans = ByLead(Rule(middle, True), masked).plans(bench.retriever, questions)
    assert {plan.strategy for plan in plans} == {"selection", "mixture"}
    for plan, one, several in zip(plans, alone, mixed, strict=True):
        assert plan == (one if lead_of(several) >= middle else several)
    assert all(lead_of(plan) == plan.adapters[0].score - plan.adapters[1].score for plan in mixed)
