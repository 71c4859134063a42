"""A Retriever over a pool with adapters of two base models, one of which is served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from lora_store import AdapterRecord, Ranking, Sample
from lora_store.errors import PlanInvalid
from lora_store.events import Rank
from lora_store.rankings import OUTCOME, RankedAdapter
from lora_store.trials import Trial
from retriever_svc import IndexSettings, PageRequest, PinnedAdapter, PoolSize, Retriever, RouteRequest, ServedBases
from retriever_svc.encoder import unit_rows
from retriever_svc.errors import AdapterIncompatible
from retriever_svc.index import Match
from retriever_svc.planning import led_by
from retriever_svc.pool import Pool
from tests.retriever_svc.pool_fakes import (
    BASE,
    FakeEncoder,
    OrdinaryRows,
    Source,
    live_pool,
    names,
    record_of,
    snapshot_of,
)
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


def test_an_adapter_of_another_base_is_neither_named_nor_replayed() -> None:
    retriever = over(Source(OLD, OWN, BARE))
    for name in ("old", "bare", "old@" + OLD.ref.digest[:12], "local/old"):
        with pytest.raises(AdapterIncompatible, match=f"adapter '{name}' was made for the base model '{OTHER}'"):
            retriever.plan_named("local", [("own", 0.5), (name, 0.5)], "fusion")
    pinned = [PinnedAdapter(record.ref.name, record.ref.digest, 0.5) for record in (OWN, OLD)]
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


def test_kept_versions_of_another_base_are_shown_and_neither_used_nor_tried() -> None:
    older = record_of("poet", EAST, version="1", base_model=OTHER)
    live = replace(record_of("poet", EAST), trial=Trial(older.ref.digest, 0.5))
    source = Source()
    source.now = snapshot_of(live, previous={("local", "poet"): (older,)})
    retriever = over(source)
    assert retriever.versions("local", "poet") == (1, [live, older])
    assert retriever.plan_named("local", [("poet", 1.0)], "selection").adapters[0].ref == live.ref
    with pytest.raises(AdapterIncompatible):
        retriever.plan_named("local", [(f"poet@{older.ref.digest}", 1.0)], "selection")
    for bases, num_trials in ((BASES, 0), (ServedBases(), 1)):
        assert len(over(source, bases).plan_named("local", [("poet", 1.0)], "selection").trials) == num_trials
        assert len(route_one(over(source, bases)).plan.trials) == num_trials


def test_the_doctor_counts_the_other_base_and_examines_the_served_one() -> None:
    unlisted = replace(
        record_of("hidden", EAST, tenant="them", base_model=OTHER), expires_at=datetime(2100, 1, 1, tzinfo=UTC)
    )
    retriever = over(Source(OLD, OWN, BARE, THEIRS, unlisted))
    *_, last = retriever.doctor("local", samples)
    assert last.report is not None
    assert [finding.ref for finding in last.report.adapters] == [OWN.ref]
    assert last.report.unserved == {OTHER: (BARE.ref, OLD.ref)}, "those that a list counts"
    assert retriever.page("local", PageRequest(1)).unserved == ((OTHER, 2),)
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
        assert names(route_one(over(source), "north")) == ["own"]
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


FAMILIES = ("a", "b", "c", "d")
SHARES = (0.5, 0.25, 0.2, 0.05)  # of the adapters, so that windows lack some of the rarest
LISTS = IndexSettings(exact_rows=20, side_rows=0, num_probes=10_000)  # all lists are read


def random_rows(rng: np.random.Generator, count: int) -> np.ndarray:
    return unit_rows(rng.standard_normal((count, 4)).astype(np.float32))


def random_record(rng: np.random.Generator, number: int, num_bases: int) -> AdapterRecord:
    """Return an adapter of few directions and few weights, so that many tie and some have the weights of another."""
    shares = np.asarray(SHARES[:num_bases])
    return record_of(
        f"r{number * 7919 % 1000:03d}",
        unit_rows(rng.integers(-2, 3, (1, 4)).astype(np.float32) + np.asarray([[0.5, 0, 0, 0]], np.float32))[0],
        tenant=str(rng.choice(["local", "them"])),
        visibility="private" if rng.random() < 0.3 else "public",
        approved=bool(rng.random() < 0.4),
        tags=tuple(tag for tag, share in (("common", 0.7), ("rare", 0.1)) if rng.random() < share),
        weights=None if rng.random() < 0.7 else f"shared-{rng.integers(0, 9)}",
        own_scores=rng.uniform(0.2, 0.99, rng.integers(0, 3)).tolist(),
        base_model=str(rng.choice([*FAMILIES[:num_bases]], p=shares / shares.sum())),
    )


def random_rankings(rng: np.random.Generator, records: Sequence[AdapterRecord]) -> dict[str, tuple[Rank, ...]]:
    """Return evaluations and outcomes of the tenant, of which some beat adapters and others praise or blame them."""
    found = []
    for number in range(int(rng.integers(0, 4))):
        one, other = (records[place] for place in rng.integers(0, len(records), 2))
        items = (RankedAdapter(one.ref, 1.0, 8, False), RankedAdapter(other.ref, -1.0, 8, True))
        is_outcome = number % 2 == 0
        anchor = (
            replace(one.ref, name=f"{OUTCOME}{number}") if is_outcome else replace(other.ref, name=f"gone-{number}")
        )
        [vector] = random_rows(rng, 1)
        ranking = Ranking(anchor, items, "fake-encoder", vector, np.asarray([1.0], np.float32))
        found.append(Rank("local", ranking, True, "us", one.created_at))
    return {"local": tuple(found)}


def slow_matches(pool: Pool, request: RouteRequest, query: np.ndarray, *, trusted_only: bool) -> list[Match]:
    """Return the judged matches among the adapters of every base model, from a loop over all of them."""
    usable = [
        record
        for record in pool.snapshot.records.values()
        if record.is_visible_to("local")
        and set(request.tags) <= set(record.tags)
        and (record.ref.tenant == "local" or record.approved or not trusted_only)
    ]
    if not usable:
        return []
    scored: dict[str, Match] = {}
    vectors = unit_rows(np.stack([record.embedding.vector for record in usable if record.embedding is not None]))
    scores = np.sum(vectors * query.astype(np.float64), axis=-1).clip(-1, 1).tolist()
    found = [Match(record, score) for record, score in zip(usable, scores, strict=True)]
    for match in sorted(found, key=lambda match: (-match.score, match.record.ref.tenant, match.record.ref.name)):
        scored.setdefault(match.record.weights_digest, match)
    num, preferences = request.num_considered, pool.preferences("local")
    views = query[np.newaxis]
    room = num + preferences.count_blamed(views)
    chosen = preferences.applied(views, list(scored.values())[:room], num, request.tags)
    [judged] = pool.judged([chosen], request.abstain or "balanced", query[np.newaxis])
    return judged if request.min_score is None else [m._replace(threshold=request.min_score) for m in judged]


def slow_base(pool: Pool, request: RouteRequest, query: np.ndarray) -> tuple[str, bool]:
    """Return the base model of the best adapter that fits, "" if none does, and whether the matches are of several."""
    matches = slow_matches(pool, request, query, trusted_only=False)
    strangers = [match.record for match in matches if match.record.ref.tenant != "local"]
    if request.min_score is None and not any(m.fits for m in matches) and not all(r.approved for r in strangers):
        others = slow_matches(pool, request, query, trusted_only=True)
        matches = others if any(match.fits for match in others) else matches
    led = led_by(request.preferred, [match for match in matches if match.fits])
    return led[0].record.base_model if led else "", len({match.record.base_model for match in matches}) > 1


def random_request(rng: np.random.Generator, text: str) -> RouteRequest:
    return RouteRequest(
        text,
        strategy=str(rng.choice(["mixture", "fusion", "selection"])),
        top_k=int(rng.integers(1, 9)),
        tags=[(), ("common",), ("rare",)][int(rng.choice(3, p=[0.6, 0.2, 0.2]))],
        min_score=None if rng.random() < 0.7 else float(rng.uniform(0, 1)),
        abstain="lenient" if rng.random() < 0.5 else None,
    )


@pytest.mark.parametrize("num_bases", [1, 2, 3, 4])
@pytest.mark.parametrize("settings", [IndexSettings(), LISTS], ids=["exact", "lists"])
def test_one_search_plans_what_a_search_of_each_base_model_plans(settings: IndexSettings, num_bases: int) -> None:
    """The base model is that of the best adapter of a slow loop. The plan is that of a request that names it."""
    rng, led, num_mixed = np.random.default_rng(num_bases), set[str](), 0
    bases = ServedBases({name: {name} for name in FAMILIES[:num_bases]})
    for size in (2, 30, 150, 400):
        records = [random_record(rng, number, num_bases) for number in range(size)]
        far = 0.25 * random_rows(rng, 16)  # so far from all that only adapters of loose samples fit
        table = {f"q{number}": row for number, row in enumerate([*random_rows(rng, 16), *far])}
        source = Source()
        source.now = snapshot_of(*records, rankings=random_rankings(rng, records))
        files = OrdinaryRows(random_rows(rng, 6))
        options = {"settings": settings, "projections": files, "background": lambda work: work()}
        pools = live_pool(FakeEncoder(table, dim=4), source, bases=bases, **options)
        retriever = Retriever(pools, temperature=TEMPERATURE)
        for text, query in table.items():
            request = random_request(rng, text)
            near = slow_matches(pools.current, request, query, trusted_only=False)
            if near and rng.random() < 0.5:
                request = replace(request, preferred=near[int(rng.integers(0, len(near)))].record.ref)
            best, is_mixed = slow_base(pools.current, request, query)
            expected = retriever.route([replace(request, base_model=best)])
            assert retriever.route([request]) == expected
            led, num_mixed = led | {best}, num_mixed + (is_mixed and best != "")
    assert led == {*FAMILIES[:num_bases], ""}
    assert (num_mixed > 20) == (num_bases > 1)
