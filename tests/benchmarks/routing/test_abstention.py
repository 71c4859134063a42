from __future__ import annotations

from typing import get_args

import pytest

from benchmarks.paper.common.tasks import read_task_list
from benchmarks.paper.retrieval.study import Task
from benchmarks.routing.abstention import Case, _foreign, measure, retriever_of, starter_case
from benchmarks.routing.shipped import family_of
from retriever_svc import Encoder, Route, RouteRequest
from retriever_svc.calibration import Abstain

SAMPLES = {
    "sums": [f"What is {number} plus {number + 3}?" for number in range(8)],
    "german": [f"Translate to German: the {thing} is old" for thing in ("cat", "dog", "house", "car", "tree", "boat")],
}
OWN = [("What is 9 plus 12?", "sums"), ("Translate to German: the street is old", "german")]


def test_the_starter_pool_is_measured_with_its_held_out_prompts() -> None:
    case = starter_case(["a prompt"])
    assert (case.name, len(case.samples), len(case.foreign)) == ("starter", 12, 1)
    assert {name for _, name in case.own} == set(case.samples)
    shown = {text for texts in case.samples.values() for text in texts}
    assert not shown & {text for text, _ in case.own}


def test_each_operating_point_is_measured_on_the_same_prompts(encoder: Encoder) -> None:
    case = Case("tiny", SAMPLES, OWN, ["Who painted the ceiling of the Sistine Chapel?"])
    outcomes = {outcome.abstain: outcome for outcome in measure(case, encoder)}
    assert list(outcomes) == list(get_args(Abstain))
    assert {(o.pool, o.top1) for o in outcomes.values()} == {("tiny", 1.0)}
    assert (outcomes["never"].kept, outcomes["never"].foreign_abstained) == (1.0, 0.0)
    kept = [outcome.kept for outcome in outcomes.values()]
    assert kept == sorted(kept, reverse=True)
    turned_away = [outcome.ordinary_abstained for outcome in outcomes.values()]
    assert turned_away == sorted(turned_away)
    assert outcomes["balanced"].foreign_auroc == 1.0


def test_adapters_without_weights_are_found_by_their_samples(encoder: Encoder) -> None:
    [route] = retriever_of(SAMPLES, encoder).route([RouteRequest("What is 40 plus 2?", abstain="never")])
    assert isinstance(route, Route)
    assert route.candidates[0].ref.name == "sums"


@pytest.mark.parametrize("is_known", [True, False])
def test_prompts_of_a_known_family_are_not_foreign(is_known: bool) -> None:
    listed = read_task_list()
    spare = listed.spares[0]
    other = next(spec for spec in listed.spares if family_of(spec.path) != family_of(spare.path))
    task = Task(spare.name, spare.cluster, (), (), (), test=("a prompt",) * 30)
    known = [spare.path if is_known else other.path]
    assert len(_foreign(listed, [task], known)) == (0 if is_known else 25)
