"""When an adapter fits a prompt well enough to answer it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lora_store.plan import Plan
from lora_store.records import AdapterRecord
from retriever_svc import NoAdapterMatched, Retriever, Route, RouteRequest
from tests.retriever_svc.pool_fakes import FakeEncoder, names, record_of
from tests.retriever_svc.routing import EAST, POOL, retriever_of, route_one

WIDE = record_of("wide", EAST, own_scores=np.linspace(0.2, 0.6, 20))
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


def test_each_candidate_must_reach_its_own_threshold() -> None:
    encoder = FakeEncoder({"near": (0.8, 0.6), "far": (-1.0, 0.0), "on": (1.0, 0.0)})
    retriever = retriever_of(WIDE, NARROW, encoder=encoder)
    near, far, on = (route_one(retriever, text) for text in ("near", "far", "on"))
    assert [c.ref.name for c in near.candidates] == ["narrow", "wide"]
    assert names(near) == ["wide"]  # the nearest does not fit, the other does
    assert (near.abstained, near.reason) == (False, "fits")
    assert (names(far), far.abstained, far.reason) == ([], True, "below_threshold")
    assert names(on) == ["wide", "narrow"]
    for route in (near, far, on):
        for candidate in route.candidates:
            assert (candidate.score >= candidate.threshold) == (candidate.confidence >= 0.03)


@pytest.mark.parametrize("approved", [False, True])
def test_narrow_adapters_of_strangers_do_not_hide_one_that_fits(approved: bool) -> None:
    narrow = np.linspace(0.97, 0.99, 20)
    crowd = [
        record_of(f"narrow-{n}", (0.9, -(0.19**0.5)), tenant="mallory", own_scores=narrow, approved=approved)
        for n in range(5)
    ]
    own = record_of("own", (0.8, 0.6), tenant="acme", own_scores=np.linspace(0.6, 0.9, 20))
    retriever = retriever_of(own, *crowd)
    route = route_one(retriever, tenant="acme", top_k=3)
    assert (names(route), route.abstained) == (([], True) if approved else (["own"], False))
    assert names(route_one(retriever, tenant="acme", top_k=3, min_score=0.85)) == ["narrow-0", "narrow-1", "narrow-2"]
    far = route_one(retriever, "west", tenant="acme", top_k=3)  # nothing fits: the nearest are shown
    assert far.abstained and [c.ref.name for c in far.candidates] == names_by_score(retriever, "west")


def names_by_score(retriever: Retriever, text: str) -> list[str]:
    route = route_one(retriever, text, tenant="acme", top_k=3, min_score=-1.0)
    return [candidate.ref.name for candidate in route.candidates]


def test_a_stricter_request_has_higher_thresholds() -> None:
    retriever = retriever_of(WIDE, NARROW, abstain="strict")
    found = {a: [c.threshold for c in route_one(retriever, abstain=a).candidates] for a in ("lenient", "balanced")}
    strict = [c.threshold for c in route_one(retriever).candidates]
    assert [a < b < c for a, b, c in zip(found["lenient"], found["balanced"], strict, strict=True)] == [True, True]
    asked = [RouteRequest("east", abstain=a) for a in ("lenient", None, "balanced")]
    together = [[c.threshold for c in answer.candidates] for answer in retriever.route(asked)]
    assert together == [found["lenient"], strict, found["balanced"]]


def test_a_request_that_never_abstains_is_answered_by_the_best_adapter_however_low_it_scores() -> None:
    encoder = FakeEncoder({"far": (-1.0, 0.0)})
    retriever = retriever_of(WIDE, NARROW, encoder=encoder)
    usual, never = route_one(retriever, "far"), route_one(retriever, "far", abstain="never")
    assert (usual.abstained, never.abstained, never.reason) == (True, False, "fits")
    assert [c.threshold for c in never.candidates] == [-1.0, -1.0]
    assert [c.confidence for c in never.candidates] == [c.confidence for c in usual.candidates]
    assert not route_one(retriever_of(WIDE, encoder=encoder, abstain="never"), "far").abstained


def test_a_requests_operating_point_overrides_the_retrievers_min_score() -> None:
    retriever = retriever_of(WIDE, NARROW, min_score=0.999)
    assert [c.threshold for c in route_one(retriever).candidates] == [0.999, 0.999]
    own = route_one(retriever, abstain="balanced")
    expected = route_one(retriever_of(WIDE, NARROW), abstain="balanced")
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
    assert base == Route(Plan("base", generation=1), (), 1, True, "no_candidates")
    assert isinstance(error, NoAdapterMatched)
    assert error.best_score is None
