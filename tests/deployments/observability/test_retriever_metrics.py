from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest

from deployments.observability.retriever_metrics import MAX_NAMED, RecentPlans, RetrieverMetrics, RoutingTotals
from lora_store import AdapterRecord, AdapterRef, Plan, PlannedAdapter, Snapshot
from retriever_svc import Candidate, NoAdapterMatched, Route, StaleIndex
from retriever_svc.route import Counted
from tests.clocks import Clock
from tests.deployments.adapter_records import adapter
from tests.deployments.metric_fakes import FakeMetrics

PUBLIC, PRIVATE = adapter("poet"), adapter("secret-plans", tenant="acme", visibility="private")


def snapshot(*records: AdapterRecord, generation: int = 7) -> Snapshot:
    return Snapshot(generation, {(record.ref.tenant, record.ref.name): record for record in records})


def route(*records: AdapterRecord, score: float = 0.8, abstained: bool = False) -> Route:
    rows = () if abstained else tuple(PlannedAdapter(r.ref, r.weights_digest, 0.5, score) for r in records)
    plan = Plan("mixture", rows, 7) if rows else Plan("base", generation=7)
    return Route(plan, tuple(Candidate(record.ref, score) for record in records), 7, abstained)


def test_gauges_report_the_served_pool_and_never_chosen_adapters() -> None:
    kinds = FakeMetrics()
    metrics = RetrieverMetrics(kinds)
    metrics.record_route(route(PUBLIC))
    metrics.report(snapshot(PUBLIC, PRIVATE), num_routable=5, read_age_s=1.5)
    names = ("catalogue_generation", "catalogue_adapters", "catalogue_read_age_seconds", "never_chosen_adapters")
    assert [kinds[name].last[()] for name in names] == [7, 2, 1.5, 4]
    for num_routable in (1, 0):  # one that was chosen may no longer be routable
        metrics.report(snapshot(PUBLIC, PRIVATE), num_routable, read_age_s=0.0)
        assert kinds["never_chosen_adapters"].last[()] == 0
    metrics.report(snapshot(PRIVATE, generation=8), num_routable=4, read_age_s=0.0)
    assert kinds["never_chosen_adapters"].last[()] == 4, "withdrawn adapters do not count as chosen"


def test_a_private_adapter_is_labelled_by_its_digest_even_if_it_was_public() -> None:
    for became in (PRIVATE, replace(PRIVATE, visibility="public")):
        kinds = FakeMetrics()
        metrics = RetrieverMetrics(kinds)
        metrics.record_route(route(PUBLIC, became))
        metrics.report(snapshot(PUBLIC, PRIVATE), 2, 0.0)
        assert kinds["recent_adapter_plans"].last == {("poet",): 1, (PRIVATE.ref.digest[:12],): 1, ("(other)",): 0}


def test_only_the_most_chosen_adapters_are_named() -> None:
    kinds = FakeMetrics()
    metrics = RetrieverMetrics(kinds)
    pool = [adapter(f"a{number}") for number in range(100)]
    for number, record in enumerate(pool):
        for _ in range(number + 1):
            metrics.record_route(route(record))
    metrics.report(snapshot(*pool), 100, 0.0)
    reported = kinds["recent_adapter_plans"].last
    assert len(reported) == MAX_NAMED + 1 and sum(reported.values()) == 5050
    assert reported[("a99",)] == 100 and ("a0",) not in reported


def test_an_adapter_that_is_not_chosen_any_more_falls_to_zero() -> None:
    kinds, clock = FakeMetrics(), Clock()
    metrics = RetrieverMetrics(kinds, RecentPlans(window_s=10, clock=clock))
    metrics.record_route(route(PUBLIC))
    metrics.report(snapshot(PUBLIC), 1, 0.0)
    clock.at += 45
    metrics.report(snapshot(PUBLIC), 1, 0.0)
    assert kinds["recent_adapter_plans"].last == {("poet",): 0, ("(other)",): 0}


def test_the_encoder_and_the_search_have_times_of_their_own() -> None:
    kinds = FakeMetrics()
    metrics = RetrieverMetrics(kinds)
    metrics.encoded(0.2)
    metrics.searched(0.01)
    assert kinds["encode_seconds"].seen == {(): [0.2]} and kinds["search_seconds"].seen == {(): [0.01]}


A, B, C = (AdapterRef("local", name, name * 64) for name in "abc")


@pytest.mark.parametrize(
    ("counted", "expected", "scores"),
    [
        ("always", {("chosen",): 1, ("abstained",): 1, ("refused",): 2}, [0.8, 0.1, 0.2]),
        ("if_chosen", {("chosen",): 1}, [0.8]),
        ("never", {}, []),
    ],
)
def test_prompts_are_counted_by_outcome_and_those_that_others_follow_if_they_find_adapters(
    counted: Counted, expected: dict[tuple[str, ...], int], scores: list[float]
) -> None:
    kinds = FakeMetrics()
    metrics = RetrieverMetrics(kinds)
    metrics.record_route(StaleIndex(9, 7), counted)
    abstained = route(PUBLIC, score=0.1, abstained=True)
    for answer in (route(PUBLIC), abstained, NoAdapterMatched(0.2, 0.4), NoAdapterMatched(None, 0.4)):
        metrics.record_route(answer, counted)
    assert kinds["routes_total"].counts == expected
    assert kinds["best_score_cosine"].seen.get((), []) == scores


def test_the_largest_counts_of_two_windows_are_named_and_the_rest_is_summed() -> None:
    clock = Clock()
    recent = RecentPlans(window_s=10, clock=clock)
    for refs in ([A], [A, B], [A, B, C]):
        recent.add(refs)
    assert recent.largest(2) == ([(A, 3), (B, 2)], 1)
    assert recent.largest(9) == ([(A, 3), (B, 2), (C, 1)], 0)
    clock.at += 10
    recent.add([B])
    assert recent.largest(1) in (([(A, 3)], 4), ([(B, 3)], 4))
    for passed_s, found in ((10, [(B, 1)]), (25, [])):
        clock.at += passed_s
        assert recent.largest(9) == (found, 0)


def test_chosen_and_always_shadowed_adapters_are_counted_until_they_are_withdrawn() -> None:
    totals = RoutingTotals()
    for _ in range(19):
        totals.add([A, B], [A])
    assert (totals.num_chosen, totals.num_shadowed) == (1, 0), "B was seen too rarely to judge"
    totals.add([A, B], [A, B])
    assert (totals.num_chosen, totals.num_shadowed) == (2, 1)
    kept = deepcopy(totals)
    kept.retain(lambda ref: ref == A)
    assert (kept.num_chosen, kept.num_shadowed) == (1, 0)
    totals.add([B, A], [])
    assert totals.num_shadowed == 0, "it was first once"
