"""A Retriever over a pool with adapters of two base models, one of which is served."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora_store import AdapterRecord, PlanInvalid, RankedAdapter, Ranking, Sample
from lora_store.events import Rank
from lora_store.rankings import OUTCOME
from lora_store.trials import Trial
from retriever_svc import (
    AdapterIncompatible,
    PageRequest,
    PinnedAdapter,
    PoolSize,
    Retriever,
    ServedBases,
)
from tests.retriever_svc.pool_fakes import BASE, FakeEncoder, Source, live_pool, names, record_of, snapshot_of
from tests.retriever_svc.routing import EAST, NORTH, NORTHEAST, TABLE, TEMPERATURE, route_one

BASES = ServedBases({"tiny-chat": {BASE, "tiny-chat"}})
OTHER = "org/other"
OWN, OLD = record_of("own", NORTH), record_of("old", EAST, base_model=OTHER)
BARE = record_of("bare", None, base_model=OTHER)  # without samples
THEIRS = record_of("theirs", EAST, base_model=OTHER, tenant="them", visibility="private")


def samples(record: AdapterRecord) -> list[Sample]:
    return [Sample("east", "right"), Sample("north", "up")]


def many_samples(record: AdapterRecord) -> list[Sample]:
    return [Sample(f"{number}", "x") for number in range(20)]


def over(source: Source, bases: ServedBases = BASES) -> Retriever:
    return Retriever(live_pool(FakeEncoder(TABLE), source, bases=bases), min_score=-1.0, temperature=TEMPERATURE)


def test_auto_chooses_and_mixes_adapters_of_the_served_base_only() -> None:
    source = Source(OLD, OWN, BARE)
    assert names(route_one(over(source), strategy="mixture", top_k=3)) == ["own"]
    assert names(route_one(over(source, ServedBases()), strategy="mixture", top_k=3)) == ["old", "own"]
    assert [c.ref.name for c in route_one(over(source), top_k=3).candidates] == ["own"]


def test_lists_counts_maps_and_neighbours_leave_out_the_other_base() -> None:
    retriever = over(Source(OLD, OWN, BARE, THEIRS))
    page = retriever.page("local", PageRequest(9))
    assert ([name for name, _ in page.rows], page.num_found, page.unserved) == (["own"], 1, ((OTHER, 2),))
    assert retriever.count("local") == PoolSize(1, 1, ((OTHER, 3),))  # those of all tenants, for the operator
    assert retriever.map("local").names == (OWN.ref.name,)
    place = retriever.place("local", "east", ["own", "old"])
    assert [point.ref for point in place.adapters] == [OWN.ref]
    assert OLD.embedding is not None
    assert [near.ref for near in retriever.neighbours(OLD.embedding, 3, "local")] == [OWN.ref]


def test_a_pool_that_changes_keeps_leaving_out_the_other_base() -> None:
    source = Source(OWN)
    pools = live_pool(FakeEncoder(TABLE), source, bases=BASES, background=lambda work: work())
    retriever = Retriever(pools, min_score=-1.0, temperature=TEMPERATURE)
    source.commit(OWN, OLD, BARE)
    pools.catch_up(2)
    assert names(route_one(retriever, strategy="mixture", top_k=3)) == ["own"]
    assert retriever.count("local") == PoolSize(2, 1, ((OTHER, 2),))
    again = replace(OLD, base_model=BASE)
    source.commit(OWN, again, BARE)
    pools.catch_up(3)
    assert names(route_one(retriever, strategy="mixture", top_k=3)) == ["old", "own"]
    source.commit(OWN, OLD, BARE)
    pools.catch_up(4)
    assert names(route_one(retriever, strategy="mixture", top_k=3)) == ["own"]
    assert pools.current.rebuilt(pools.current.index.compacted(), pools.current).index.num_live == 1


@pytest.mark.parametrize("name", ["old", "bare", "old@" + OLD.ref.digest[:12], "local/old"])
def test_naming_an_adapter_of_another_base_is_an_error(name: str) -> None:
    retriever = over(Source(OLD, OWN, BARE))
    with pytest.raises(AdapterIncompatible, match=f"adapter '{name}' was made for the base model '{OTHER}'"):
        retriever.plan_named("local", [("own", 0.5), (name, 0.5)], "fusion")


def test_a_plan_with_an_adapter_of_another_base_is_not_replayed() -> None:
    pinned = [PinnedAdapter(record.ref.name, record.ref.digest, 0.5) for record in (OWN, OLD)]
    retriever = over(Source(OLD, OWN))
    with pytest.raises(AdapterIncompatible, match="'old' was made for"):
        retriever.replay("local", "mixture", pinned, 1)
    assert retriever.replay("local", "selection", pinned[:1], 1).adapters[0].ref == OWN.ref


def test_an_own_adapter_of_another_base_is_not_replaced_by_a_public_namesake() -> None:
    public = record_of("old", NORTH, tenant="them")
    private = replace(OLD, visibility="private")
    retriever = over(Source(private, public))
    with pytest.raises(AdapterIncompatible):
        retriever.plan_named("local", [("old", 1.0)], "selection")
    assert retriever.plan_named("local", [("them/old", 1.0)], "selection").adapters[0].ref == public.ref


def test_kept_versions_of_another_base_are_shown_and_cannot_be_used() -> None:
    live = record_of("poet", EAST)
    older = record_of("poet", EAST, version="1", base_model=OTHER)
    source = Source()
    source.now = snapshot_of(live, previous={("local", "poet"): (older,)})
    retriever = over(source)
    assert retriever.versions("local", "poet") == (1, [live, older])
    assert retriever.plan_named("local", [("poet", 1.0)], "selection").adapters[0].ref == live.ref
    with pytest.raises(AdapterIncompatible):
        retriever.plan_named("local", [(f"poet@{older.ref.digest}", 1.0)], "selection")


def test_a_trial_of_a_version_of_another_base_takes_no_requests() -> None:
    older = record_of("poet", EAST, version="1", base_model=OTHER)
    live = replace(record_of("poet", EAST), trial=Trial(older.ref.digest, 0.5))
    source = Source()
    source.now = snapshot_of(live, previous={("local", "poet"): (older,)})
    for bases, num_trials in ((BASES, 0), (ServedBases(), 1)):
        retriever = over(source, bases)
        assert len(retriever.plan_named("local", [("poet", 1.0)], "selection").trials) == num_trials
        assert len(route_one(retriever).plan.trials) == num_trials


def test_a_ranking_prefers_no_adapter_of_another_base() -> None:
    items = (RankedAdapter(OLD.ref, 1.0, 8, False), RankedAdapter(OWN.ref, 0.2, 8, True))
    ranking = Ranking(OWN.ref, items, "fake-encoder", np.asarray(NORTH, np.float32), np.asarray([1.0], np.float32))
    source = Source()
    source.now = snapshot_of(OLD, OWN, rankings={"local": (Rank("local", ranking, True, "us", OWN.created_at),)})
    assert names(route_one(over(source, ServedBases()), "north")) == ["old"]
    assert names(route_one(over(source), "north")) == ["own"]


def test_the_doctor_counts_the_other_base_and_examines_the_served_one() -> None:
    *_, last = over(Source(OLD, OWN, BARE, THEIRS)).doctor("local", samples)
    assert last.report is not None
    assert [finding.ref for finding in last.report.adapters] == [OWN.ref]
    assert last.report.unserved == {OTHER: (BARE.ref, OLD.ref)}


def test_regions_have_no_adapters_of_another_base() -> None:
    own = record_of("own", NORTHEAST, num_samples=2)
    [region] = over(Source(replace(OLD, num_samples=2), own, BARE)).regions("local", many_samples)
    assert [record.ref for record in region.candidates] == [own.ref]


def test_a_reindex_embeds_the_adapters_of_every_base() -> None:
    """The encoder can be activated only once all have an embedding by it."""
    old = replace(OLD, num_samples=2, samples_digest="x", embedding=None)
    steps = list(over(Source(old, OWN)).reindex("model", samples))
    assert [ref for step in steps for ref in step.embeddings] == [OLD.ref]


SEVERAL = ServedBases({"tiny-chat": {BASE}, "other": {OTHER}})
MORE = [record_of(f"own-{number}", (number / 9, 1.0)) for number in range(1, 4)]
MIXED = Source(OLD, OWN, *MORE)


def test_a_plan_has_the_base_of_the_best_adapter_and_what_that_base_has_alone() -> None:
    retriever = over(MIXED, SEVERAL)
    for text, base_model, best in (("east", "other", "old"), ("north", "tiny-chat", "own")):
        route = route_one(retriever, text, strategy="mixture", top_k=3)
        alone = over(MIXED, ServedBases({base_model: (SEVERAL.accepted or {})[base_model]}))
        alone_route = route_one(alone, text, strategy="mixture", top_k=3)
        assert route == replace(alone_route, plan=replace(alone_route.plan, base_model=base_model))
        assert (route.plan.base_model, names(route)[0]) == (base_model, best)


def test_a_request_may_choose_the_base_and_gets_it_also_without_an_adapter() -> None:
    retriever = over(MIXED, SEVERAL)
    route = route_one(retriever, "east", top_k=3, base_model="tiny-chat")
    assert (route.plan.base_model, names(route)) == ("tiny-chat", ["own-3", "own-2", "own-1"])
    for chosen, base_model in (("", "tiny-chat"), ("other", "other")):
        plan = route_one(retriever, "north", min_score=1.1, base_model=chosen).plan
        assert (plan.strategy, plan.base_model) == ("base", base_model)


def test_the_adapter_of_the_turn_before_keeps_its_base() -> None:
    near = record_of("near", (0.05, 1.0), base_model=OTHER)
    route = route_one(over(Source(OWN, near), SEVERAL), "north", preferred=near.ref)
    assert (route.plan.base_model, names(route)) == ("other", ["near"])


def test_named_adapters_of_two_bases_form_no_plan() -> None:
    retriever = over(MIXED, SEVERAL)
    assert retriever.plan_named("local", [("old", 1.0)], "selection").base_model == "other"
    with pytest.raises(PlanInvalid, match="must have one base model, got 'own' for 'tiny-chat', 'old' for 'other'"):
        retriever.plan_named("local", [("own", 0.5), ("old", 0.5)])
    pinned = [PinnedAdapter(record.ref.name, record.ref.digest, 0.5) for record in (OWN, OLD)]
    assert retriever.replay("local", "selection", pinned[1:], 1).base_model == "other"
    with pytest.raises(PlanInvalid, match="must have one base model"):
        retriever.replay("local", "mixture", pinned, 1)


def test_the_doctor_finds_what_a_plan_would_have() -> None:
    near = record_of("near", (0.05, 1.0), base_model=OTHER)
    *_, last = over(Source(OWN, near), SEVERAL).doctor("local", lambda record: [Sample("north")])
    assert last.report is not None
    found = {item.ref.name: (item.num_first, item.num_found, item.shadowed_by) for item in last.report.adapters}
    assert found == {"own": (1, 1, None), "near": (0, 0, OWN.ref)}


def test_rankings_stay_within_a_base() -> None:
    items = (RankedAdapter(OLD.ref, 1.0, 8, False), RankedAdapter(OWN.ref, 0.2, 8, True))
    vectors = np.asarray(NORTH, np.float32), np.asarray([1.0], np.float32)
    for anchor in (OWN.ref, replace(OWN.ref, name="withdrawn")):
        ranking = Ranking(anchor, items, "fake-encoder", *vectors)
        source = Source()
        source.now = snapshot_of(OLD, OWN, rankings={"local": (Rank("local", ranking, True, "us", OWN.created_at),)})
        assert names(route_one(over(source, ServedBases()), "north")) == ["old"]
        assert names(route_one(over(source, SEVERAL), "north", base_model="tiny-chat")) == ["own"]
    praised = Ranking(replace(OWN.ref, name=f"{OUTCOME}1"), items[:1], "fake-encoder", *vectors)
    source = Source()
    source.now = snapshot_of(OLD, OWN, rankings={"local": (Rank("local", praised, True, "us", OWN.created_at),)})
    assert "old" in names(route_one(over(source, ServedBases()), "north", strategy="mixture"))
    assert names(route_one(over(source, SEVERAL), "north", strategy="mixture", base_model="tiny-chat")) == ["own"]
    regions = over(Source(*[replace(r, num_samples=2) for r in (OLD, OWN)], BARE), SEVERAL).regions(
        "local", many_samples
    )
    assert {(r.anchor.ref.name, *[c.ref.name for c in r.candidates]) for r in regions} == {
        ("own", "own"),
        ("old", "old", "bare"),
    }
