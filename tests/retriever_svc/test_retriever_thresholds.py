"""When an adapter fits a prompt well enough to answer it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lora_store.plan import Plan
from lora_store.records import AdapterRecord
from retriever_svc import AskedPrompt, NoAdapterMatched, Route, RouteRequest
from tests.retriever_svc.pool_fakes import FakeEncoder, names, record_of
from tests.retriever_svc.routing import EAST, POOL, retriever_of, route_one

# A prompt at 45 degrees to two groups of ordinary prompts: near the first one, far from the second.
ORDINARY = [(0.0, 1.0), (0.02, 0.9998), (-0.02, 0.9998), (0.01, 0.99995)]
WIDE = record_of("wide", EAST, own_scores=np.linspace(0.2, 0.6, 20))
POINTS = ("lenient", "balanced")
NARROW = record_of("narrow", (0.99, 0.141), own_scores=np.linspace(0.97, 0.99, 20))


@pytest.mark.parametrize(("nudge", "abstains"), [(-1, False), (0, False), (1, True)])
def test_only_candidates_that_reach_min_score_are_planned(nudge: int, abstains: bool) -> None:
    retriever = retriever_of(POOL[0], POOL[1])
    best = route_one(retriever, text="northeast").candidates[0].score
    least = best if nudge == 0 else math.nextafter(best, math.copysign(2, nudge))
    route = route_one(retriever, text="northeast", min_score=least)
    assert (route.abstained, route.reason) == (abstains, "below_threshold" if abstains else "fits")
    assert route.plan == Plan("base", generation=1) if abstains else names(route) == ["n"]
    assert [(c.ref.name, c.threshold) for c in route.candidates] == [("n", least), ("e", least)]


def test_a_prompt_nearer_to_ordinary_prompts_than_to_its_adapter_goes_to_the_base_model() -> None:
    encoder = FakeEncoder({"on": (1.0, 0.0), "between": (0.5, 0.866), "away": (0.8, -0.6)})
    retriever = retriever_of(WIDE, NARROW, encoder=encoder, ordinary=ORDINARY)
    on, between, away = (route_one(retriever, text) for text in ("on", "between", "away"))
    assert (names(on), on.abstained, on.reason) == (["wide", "narrow"], False, "fits")
    assert (names(between), between.abstained, between.reason) == ([], True, "below_threshold")
    assert names(away) == ["wide", "narrow"]
    for route in (on, between, away):
        assert {c.score >= c.threshold for c in route.candidates} == {not route.abstained}


def test_each_candidate_must_reach_its_own_threshold() -> None:
    """The loose floor of an adapter's own samples is above the score of the nearest one."""
    tight = record_of("tight", (0.8, 0.6), own_scores=[0.99] * 20)
    loose = record_of("loose", (0.75, -0.6614), own_scores=[0.1] * 20)
    encoder = FakeEncoder({"far": (0.3, -0.0666)})
    route = route_one(retriever_of(tight, loose, encoder=encoder, ordinary=[(-1.0, 0.0)] * 4), "far")
    assert [c.ref.name for c in route.candidates] == ["loose", "tight"]
    assert names(route) == ["loose"]
    assert route.candidates[1].threshold == pytest.approx(0.297, abs=1e-6)


def test_the_doctor_judges_as_many_candidates_of_a_prompt_as_requests_do() -> None:
    tight = record_of("tight", (0.8, 0.6), own_scores=[0.99] * 20)
    loose = record_of("loose", (0.75, -0.6614), own_scores=[0.1] * 20)
    encoder = FakeEncoder({"far": (0.3, 0.0666)})
    for top_k, answering in ((1, None), (2, loose.ref)):
        retriever = retriever_of(tight, loose, encoder=encoder, ordinary=[(-1.0, 0.0)] * 4, top_k=top_k)
        *_, last = retriever.doctor("local", lambda record: [], [AskedPrompt("far")])
        assert last.report is not None and last.report.asked is not None
        assert (last.report.top_k, dict(last.report.asked.unlabelled)) == (top_k, {answering: 1})


def test_adapters_of_strangers_that_do_not_fit_hide_none_that_does() -> None:
    ordinary_like = [
        record_of(f"narrow-{n}", (0.05, 0.99875), tenant="mallory", own_scores=[0.9] * 20, weights=f"{n}")
        for n in range(5)
    ]
    own = record_of("own", (0.8, -0.6), tenant="acme", own_scores=np.linspace(0.6, 0.9, 20))
    encoder = FakeEncoder({"asked": (0.71, 0.7042)})
    retriever = retriever_of(own, *ordinary_like, encoder=encoder, ordinary=ORDINARY)
    route = route_one(retriever, "asked", tenant="acme", top_k=3)
    assert route.abstained and [c.ref.name for c in route.candidates] == ["narrow-0", "narrow-1", "narrow-2"]
    near = FakeEncoder({"asked": (0.6, 0.0)})
    retriever = retriever_of(own, *ordinary_like, encoder=near, ordinary=[(-1.0, 0.0)] * 4)
    assert names(route_one(retriever, "asked", tenant="acme", top_k=1)) == ["own"]


def test_a_stricter_request_has_higher_thresholds() -> None:
    retriever = retriever_of(WIDE, NARROW, abstain="strict", ordinary=ORDINARY)
    found = {a: [c.threshold for c in route_one(retriever, "northeast", abstain=a).candidates] for a in POINTS}
    strict = [c.threshold for c in route_one(retriever, "northeast").candidates]
    assert [a < b < c for a, b, c in zip(found["lenient"], found["balanced"], strict, strict=True)] == [True, True]
    asked = [RouteRequest("northeast", abstain=a) for a in ("lenient", None, "balanced")]
    together = [[c.threshold for c in answer.candidates] for answer in retriever.route(asked)]
    assert together == [found["lenient"], strict, found["balanced"]]


def test_a_request_that_never_abstains_is_answered_by_the_best_adapter_however_low_it_scores() -> None:
    encoder = FakeEncoder({"far": (-1.0, 0.0)})
    retriever = retriever_of(WIDE, NARROW, encoder=encoder, ordinary=ORDINARY)
    usual, never = route_one(retriever, "far"), route_one(retriever, "far", abstain="never")
    assert (usual.abstained, never.abstained, never.reason) == (True, False, "fits")
    assert [c.threshold for c in never.candidates] == [-1.0, -1.0]
    assert [c.confidence for c in never.candidates] == [c.confidence for c in usual.candidates]
    assert not route_one(retriever_of(WIDE, encoder=encoder, ordinary=ORDINARY, abstain="never"), "far").abstained


def test_a_requests_operating_point_overrides_the_retrievers_min_score() -> None:
    retriever = retriever_of(WIDE, NARROW, min_score=0.999, ordinary=ORDINARY)
    assert [c.threshold for c in route_one(retriever).candidates] == [0.999, 0.999]
    own = route_one(retriever, abstain="balanced")
    expected = route_one(retriever_of(WIDE, NARROW, ordinary=ORDINARY), abstain="balanced")
    assert [c.threshold for c in own.candidates] == [c.threshold for c in expected.candidates]


def test_below_the_floor_the_error_is_returned_in_its_own_place() -> None:
    retriever = retriever_of(*POOL, min_score=0.9)
    asked = [RouteRequest("east"), RouteRequest("west", fallback="error"), RouteRequest("west"), RouteRequest("north")]
    first, error, base, last = retriever.route(asked)
    assert isinstance(error, NoAdapterMatched)
    assert error.best_score == pytest.approx(0)
    assert error.threshold == 0.9
    assert isinstance(base, Route)
    assert base.abstained
    assert names(first)[0] == "e"
    assert names(last)[0] == "n"


def test_a_requests_floor_overrides_the_retrievers() -> None:
    retriever = retriever_of(POOL[0], min_score=0.9)
    assert route_one(retriever, "northeast").abstained
    assert not route_one(retriever, "northeast", min_score=0.5).abstained


def test_without_any_floor_the_worst_match_is_taken() -> None:
    assert names(route_one(retriever_of(POOL[0]), "west")) == ["e"]


@pytest.mark.parametrize("records", [(), (record_of("p", EAST, tenant="other", visibility="private"),)])
def test_a_pool_empty_for_the_caller_abstains(records: tuple[AdapterRecord, ...]) -> None:
    retriever = retriever_of(*records)
    base, error = retriever.route([RouteRequest("east"), RouteRequest("east", fallback="error")])
    assert base == Route(Plan("base", generation=1), (), 1, True, "no_candidates", text="east")
    assert isinstance(error, NoAdapterMatched)
    assert error.best_score is None
