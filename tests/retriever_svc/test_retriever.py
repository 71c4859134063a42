from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest

from lora_store.adapter import LOCAL_TENANT, AdapterRef, Sample
from lora_store.errors import AdapterNotFound
from lora_store.names import NamedPolicy
from lora_store.records import AdapterRecord, OutputProfile
from retriever_svc import (
    AskedPrompt,
    IndexSettings,
    NoAdapterMatched,
    Page,
    PageRequest,
    Retriever,
    Route,
    RouteRequest,
    StaleIndex,
)
from retriever_svc.doctor import examine
from retriever_svc.encoder import CHUNK_TOKENS, MAX_CHARS, tokens_read
from retriever_svc.route import STICKY_MARGIN, Weighting
from retriever_svc.served_bases import ServedBases
from tests.retriever_svc.pool_fakes import FakeEncoder, Source, embedding_of, live_pool, names, record_of
from tests.retriever_svc.routing import EAST, NORTH, POOL, SOUTHWEST, TABLE, TEMPERATURE, retriever_of, route_one


def test_a_uniform_mixture_plans_the_best_with_equal_weights() -> None:
    route = route_one(retriever_of(*POOL), top_k=2, weighting="uniform")
    assert names(route) == ["e", "ne"]
    assert route.plan.strategy == "mixture"
    assert [adapter.weight for adapter in route.plan.adapters] == [0.5, 0.5]
    assert [adapter.score for adapter in route.plan.adapters] == pytest.approx([1, 0.6], abs=1e-6)
    assert [adapter.weights_digest for adapter in route.plan.adapters] == [
        POOL[0].weights_digest,
        POOL[2].weights_digest,
    ]
    assert [(c.ref, c.score) for c in route.candidates] == [(a.ref, a.score) for a in route.plan.adapters]
    assert route.generation == route.plan.generation == 1
    assert not route.abstained
    route = route_one(retriever_of(*POOL), strategy="selection", weighting="softmax")
    assert [(a.ref.name, a.weight) for a in route.plan.adapters] == [("e", 1.0)]
    assert [c.ref.name for c in route.candidates] == ["e", "ne", "n"]


def test_weights_of_the_rows_returned_sum_to_one() -> None:
    for strategy, weighting, top_k in product(("mixture", "fusion"), get_args(Weighting), (1, 2, 3, 16)):
        plan = route_one(retriever_of(*POOL), strategy=strategy, weighting=weighting, top_k=top_k).plan
        assert (plan.strategy, len(plan.adapters)) == (strategy, min(top_k, 3))
        assert sum(adapter.weight for adapter in plan.adapters) == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "planned"),
    [({}, ["ne", "n", "e"]), ({"kept_weight": 0.7}, ["ne", "n"]), ({"kept_weight": 0.3}, ["ne"])],
)
def test_a_top_p_mixture_has_the_heaviest_adapters_and_shows_all(options: dict[str, float], planned: list[str]) -> None:
    """The weights before are 0.40, 0.33 and 0.27."""
    fields = {"strategy": "top_p_mixture", "weighting": "softmax", "options": options}
    route = route_one(retriever_of(*POOL), "northeast", **fields)
    assert (names(route), route.plan.strategy) == (planned, "top_p_mixture")
    assert sum(adapter.weight for adapter in route.plan.adapters) == pytest.approx(1)
    assert [candidate.ref.name for candidate in route.candidates] == ["ne", "n", "e"]


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_softmax_weights_follow_the_scores_and_the_temperature(temperature: float) -> None:
    plan = route_one(retriever_of(*POOL, temperature=temperature), weighting="softmax", text="northeast").plan
    parts = [math.exp(score / temperature) for score in (1, 0.8, 0.6)]
    assert names(route_one(retriever_of(*POOL), text="northeast")) == ["ne", "n", "e"]
    assert [a.weight for a in plan.adapters] == pytest.approx([part / sum(parts) for part in parts], abs=1e-5)


YES_NO, HIGH_LOW = OutputProfile(("no", "yes")), OutputProfile(("high", "low"))


@pytest.mark.parametrize(
    ("first", "second", "score", "expected"),
    [
        (YES_NO, YES_NO, 0.96, [0.5, 0.5]),
        (YES_NO, YES_NO, 0.94, [0.75, 0.25]),
        (YES_NO, HIGH_LOW, 0.96, [0.75, 0.25]),
        (YES_NO, None, 0.96, [0.75, 0.25]),
        (None, None, 0.96, [0.75, 0.25]),
    ],
    ids=["agree and close", "agree and apart", "disagree", "one unknown", "both unknown"],
)
def test_weights_by_evidence_are_equal_only_for_close_scores_and_one_function(
    first: OutputProfile | None, second: OutputProfile | None, score: float, expected: list[float]
) -> None:
    own = record_of("own", EAST)
    other = record_of("other", (score, (1 - score**2) ** 0.5))
    pool = [
        replace(record, embedding=replace(record.embedding, outputs=outputs))
        for record, outputs in ((own, first), (other, second))
        if record.embedding is not None
    ]
    plan = route_one(retriever_of(*pool, temperature=100), weighting="evidence").plan
    assert [adapter.ref.name for adapter in plan.adapters] == ["own", "other"]
    assert [adapter.weight for adapter in plan.adapters] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("best", "others", "caller", "expected"),
    [
        ("acme", ["acme"], "initech", [0.5, 0.5]),
        ("acme", ["mallory"], "initech", [0.75, 0.25]),
        ("acme", ["mallory", "mallory"], "initech", [0.75, 0.125, 0.125]),
        ("acme", ["mallory"], "acme", [0.75, 0.25]),
        ("mallory", ["acme"], "acme", [0.5, 0.5]),  # the caller trusts its own
    ],
)
def test_copies_of_another_owner_do_not_share_the_weight_of_the_best_adapter(
    best: str, others: Sequence[str], caller: str, expected: list[float]
) -> None:
    near = (0.97, (1 - 0.97**2) ** 0.5)
    owned = [record_of("best", EAST, tenant=best)]
    owned += [record_of(f"near-{place}", near, tenant=tenant) for place, tenant in enumerate(others)]
    pool = [
        replace(record, embedding=replace(record.embedding, outputs=YES_NO)) for record in owned if record.embedding
    ]
    plan = route_one(retriever_of(*pool, temperature=100), weighting="evidence", tenant=caller).plan
    assert [adapter.weight for adapter in plan.adapters] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("lead", "min_score", "planned"),
    [
        (STICKY_MARGIN - 0.01, -1.0, ["previous", "n"]),
        (STICKY_MARGIN + 0.01, -1.0, ["e", "previous", "n"]),
        (STICKY_MARGIN - 0.01, 0.95, ["e"]),
    ],
    ids=["close", "clearly better", "below the threshold"],
)
def test_the_preferred_adapter_stays_unless_one_is_far_better(
    lead: float, min_score: float, planned: list[str]
) -> None:
    score = 1 - lead
    previous = record_of("previous", (score, (1 - score**2) ** 0.5))
    retriever = retriever_of(POOL[0], previous, POOL[1])
    earlier_version = record_of("previous", None, version="1").ref
    route = route_one(retriever, preferred=earlier_version, min_score=min_score)
    assert names(route) == planned
    assert [candidate.ref.name for candidate in route.candidates] == ["e", "previous", "n"]
    assert names(route_one(retriever, preferred=record_of("gone", None).ref)) == ["e", "previous", "n"]


@pytest.mark.parametrize("strategy", ["mixture", "selection"])
def test_the_preferred_adapter_stays_where_only_one_adapter_is_requested(strategy: str) -> None:
    close = 1 - STICKY_MARGIN / 2
    previous = record_of("previous", (close, (1 - close**2) ** 0.5))
    retriever = retriever_of(POOL[0], previous, POOL[1])
    one = {"top_k": 1, "strategy": strategy}
    assert names(route_one(retriever, **one)) == ["e"]
    assert names(route_one(retriever, preferred=previous.ref, **one)) == ["previous"]
    gone = route_one(retriever, preferred=record_of("gone", None).ref, **one)  # withdrawn since the previous turn
    assert names(gone) == ["e"]
    together = [RouteRequest("east", top_k=1), RouteRequest("east", top_k=1, preferred=previous.ref)]
    first, second = retriever.route(together)
    assert isinstance(first, Route) and isinstance(second, Route)
    assert ([c.ref.name for c in first.candidates], names(second)) == (["e"], ["previous"])


def test_the_encoder_is_called_once_per_batch() -> None:
    encoder = FakeEncoder(TABLE)
    retriever = retriever_of(*POOL, encoder=encoder)
    texts = ["north", "east", "northeast", "east"]
    requests = [RouteRequest(text, tenant=f"t{i % 2}", top_k=1 + i) for i, text in enumerate(texts)]
    routes = retriever.route(requests)
    assert encoder.batches == [texts]
    assert [names(route)[0] for route in routes] == ["n", "e", "ne", "e"]
    assert [len(names(route)) for route in routes] == [1, 2, 3, 3]
    assert retriever.route([]) == []


def test_private_adapters_of_others_are_never_candidates_nor_resolvable() -> None:
    mine = record_of("mine", EAST, tenant="a", visibility="private")
    theirs = record_of("theirs", EAST, tenant="b", visibility="private")
    retriever = retriever_of(mine, theirs, record_of("all", NORTH, tenant="b"))
    asked = [RouteRequest("east", tenant=tenant) for tenant in ("a", "b", "a", "c")]
    assert [names(route) for route in retriever.route(asked)] == [
        ["mine", "all"],
        ["theirs", "all"],
        ["mine", "all"],
        ["all"],
    ]
    neighbours = retriever.neighbours(embedding_of(EAST), 5, tenant="a")
    assert [candidate.ref.name for candidate in neighbours] == ["mine", "all"]
    assert retriever.neighbours(embedding_of((1.0, 0.0, 0.0), encoder="another"), 5, tenant="a") == ()
    for name in ("theirs", "b/theirs", f"b/theirs@{theirs.ref.digest}", "nothing"):
        with pytest.raises(AdapterNotFound) as caught:
            retriever.resolve("a", name)
        assert caught.value.wanted == name
    assert retriever.resolve("b", "theirs") == theirs


@pytest.mark.parametrize(
    ("templates", "common"),
    [(("chat", "chat"), "chat"), (("chat", "alpaca"), None), (("chat", None), None), ((None, None), None)],
)
def test_a_plan_has_the_template_that_its_adapters_name(templates: tuple[str | None, ...], common: str | None) -> None:
    records = [record_of(f"a{n}", EAST, template=template) for n, template in enumerate(templates)]
    retriever = retriever_of(*records, record_of("unplanned", (-1.0, 0.0), template="other"))
    assert route_one(retriever, top_k=2).plan.template == common
    assert retriever.plan_named(LOCAL_TENANT, [("a0", 1.0), ("a1", 1.0)]).template == common


def test_named_weights_are_used_as_given() -> None:
    plan = retriever_of(*POOL).plan_named(LOCAL_TENANT, [("n", 2.5), ("local/e", -0.5)], "fusion")
    assert plan.strategy == "fusion"
    assert [(a.ref.name, a.weight) for a in plan.adapters] == [("n", 2.5), ("e", -0.5)]


def test_a_digest_prefix_of_the_live_version_resolves_and_no_other_digest() -> None:
    retriever, digest = retriever_of(*POOL), POOL[1].ref.digest
    for length in (8, 12, 64):
        assert retriever.resolve(LOCAL_TENANT, f"n@{digest[:length]}") == POOL[1]
        assert retriever.resolve("other", f"local/n@{digest[:length]}") == POOL[1]
    for other in ("", digest[:7], POOL[0].ref.digest, digest + "0"):
        for call in (retriever.resolve, lambda tenant, name: retriever.plan_named(tenant, [(name, 1.0)])):
            with pytest.raises(AdapterNotFound):
                call(LOCAL_TENANT, f"n@{other}")


def test_a_page_has_the_adapters_that_the_tenant_may_use_under_its_names() -> None:
    theirs = record_of("theirs", EAST, tenant="b", visibility="private")
    retriever = retriever_of(*reversed(POOL), theirs)
    public = [(f"{record.ref.tenant}/{record.ref.name}", record) for record in POOL]
    assert retriever.page("a", PageRequest(9)) == Page(1, tuple(public), False, 3)
    assert retriever.page("b", PageRequest(9)) == Page(1, (*public, ("theirs", theirs)), False, 4)


def test_a_search_in_progress_stays_in_its_generation() -> None:
    source = Source(POOL[0])

    class Overtaken(FakeEncoder):
        def encode(self, texts: Sequence[str], owners: Sequence[str] | None = None) -> np.ndarray:
            if source.now.generation == 1:
                source.commit(POOL[1])
                pools.catch_up()
            return super().encode(texts, owners)

    pools = live_pool(Overtaken(TABLE), source)
    retriever = Retriever(pools)
    route = route_one(retriever)
    assert (names(route), route.generation) == (["e"], 1)
    assert retriever.generation == 2
    later = route_one(retriever)
    assert (names(later), later.generation, later.plan.generation) == (["n"], 2, 2)
    with pytest.raises(AdapterNotFound):
        retriever.resolve(LOCAL_TENANT, "e")


def test_a_request_for_a_later_generation_is_stale_and_the_others_are_answered() -> None:
    retriever = retriever_of(*POOL)
    asked = [RouteRequest("east"), RouteRequest("nothing", min_generation=2), RouteRequest("north", min_generation=1)]
    first, stale, last = retriever.route(asked)  # stale requests are not encoded
    assert isinstance(stale, StaleIndex)
    assert (stale.wanted, stale.found) == (2, 1)
    assert isinstance(first, Route)
    assert isinstance(last, Route)
    assert (names(first)[0], names(last)[0]) == ("e", "n")


@pytest.mark.parametrize(
    "read",
    [
        lambda retriever, least: retriever.plan_named(LOCAL_TENANT, [("n", 1.0)], min_generation=least),
        lambda retriever, least: retriever.find_model(LOCAL_TENANT, "n", "selection", least),
        lambda retriever, least: retriever.resolve(LOCAL_TENANT, "n", least),
        lambda retriever, least: retriever.page(LOCAL_TENANT, PageRequest(9), least),
        lambda retriever, least: retriever.versions(LOCAL_TENANT, "n", least),
    ],
    ids=["plan_named", "find_model", "resolve", "page", "versions"],
)
def test_every_read_checks_its_min_generation(read: Callable[[Retriever, int], object]) -> None:
    retriever = retriever_of(*POOL)
    assert read(retriever, 1) == read(retriever, 0)
    with pytest.raises(StaleIndex):
        read(retriever, 2)


def test_a_model_name_means_its_policy_or_else_one_adapter() -> None:
    source = Source()
    policies = tuple(
        NamedPolicy(AdapterRef(LOCAL_TENANT, "support", digest * 64), "{}", "", datetime.now(UTC)) for digest in "ab"
    )
    source.commit(*POOL, record_of("damaged", NORTH, base_model="other"), names={(LOCAL_TENANT, "support"): policies})
    bases = ServedBases({"served": {POOL[0].base_model}})
    retriever = Retriever(live_pool(FakeEncoder(TABLE), source, bases=bases))
    assert retriever.find_model(LOCAL_TENANT, "support", "selection") == policies[0]
    assert retriever.find_model(LOCAL_TENANT, f"support@{'b' * 8}", "selection") == policies[1]
    for strategy in ("selection", "mixture"):
        planned = retriever.plan_named(LOCAL_TENANT, [("n", 1.0)], strategy)
        assert retriever.find_model(LOCAL_TENANT, "n", strategy) == planned
    for unusable in ("unknown", "damaged", "support@cccccccc"):
        assert retriever.find_model(LOCAL_TENANT, unusable, "selection") is None


def test_tags_restrict_the_plan_but_not_the_thresholds() -> None:
    tagged = record_of("tagged", NORTH, tags=("x", "y"), own_scores=[0.9] * 5)
    loose = record_of("loose", EAST, tags=("x",), own_scores=[0.5] * 5)
    retriever = retriever_of(*POOL, tagged, loose, ordinary=SOUTHWEST)
    asked = [RouteRequest("east", tags=tags, min_score=-1) for tags in ((), ("x",), ("x", "y"), ("z",))]
    found = [[c.ref.name for c in answer.candidates] for answer in retriever.route(asked) if isinstance(answer, Route)]
    assert found == [["e", "loose", "ne"], ["loose", "tagged"], ["tagged"], []]
    [error] = retriever.route([RouteRequest("east", tags=("x", "y"), fallback="error")])
    assert isinstance(error, NoAdapterMatched)
    everything = route_one(retriever, top_k=16)
    assert error.threshold == next(c.threshold for c in everything.candidates if c.ref == tagged.ref) > 0


def test_with_owner_names_a_bare_name_means_only_the_callers_own_adapter() -> None:
    theirs, mine = record_of("poet", NORTH, tenant="globex"), record_of("coder", EAST, tenant="acme")
    hidden = record_of("secret", EAST, tenant="globex", visibility="private")
    bare, owned = retriever_of(theirs, mine, hidden), retriever_of(theirs, mine, hidden, owner_names=True)
    assert bare.resolve("acme", "poet").ref == theirs.ref
    digest = theirs.ref.digest
    asked: list[Callable[[Retriever, str], Any]] = [
        lambda retriever, name: retriever.resolve("acme", name),
        lambda retriever, name: retriever.versions("acme", name),
        lambda retriever, name: retriever.plan_named("acme", [("coder", 1.0), (name, 1.0)]),
    ]
    for ask in asked:
        for name in ("poet", f"poet@{digest}"):
            with pytest.raises(AdapterNotFound) as caught:
                ask(owned, name)
            assert (caught.value.wanted, caught.value.hint) == (name, "globex/poet")
            ask(bare, name)
        ask(owned, "globex/poet")
        for name in ("secret", "nothing", "globex/secret"):
            with pytest.raises(AdapterNotFound) as caught:
                ask(owned, name)
            assert caught.value.hint == ""
    assert owned.resolve("globex", "poet").ref == theirs.ref
    assert [point.ref for point in owned.place("acme", "east", ["poet", "globex/poet", "coder"]).adapters] == [
        theirs.ref,
        mine.ref,
    ]


def test_the_doctor_reads_as_much_of_a_prompt_as_routing_does() -> None:
    half, passed_over = MAX_CHARS // 2, "and more"
    text = "a" * half + "b" * half
    retriever = retriever_of(record_of("east", EAST), encoder=FakeEncoder({**TABLE, text: EAST}))
    long = f"{text[:half]}{passed_over}{text[half:]}"
    *_, last = retriever.doctor("local", lambda record: [], prompts=[AskedPrompt(long)])
    assert last.report is not None and last.report.asked is not None
    assert last.report.asked.unlabelled.total() == 1


def test_the_doctor_lets_other_prompts_pass_between_small_chunks_of_its_own() -> None:
    encoder = FakeEncoder(defaultdict(lambda: EAST))
    retriever = retriever_of(record_of("east", EAST), encoder=encoder)
    prompts = [AskedPrompt("\n\n".join(f"{number} {part} " * 80 for part in "abcd")) for number in range(20)]
    *_, last = retriever.doctor("local", lambda record: [], prompts=prompts)
    assert last.report is not None and last.report.asked is not None
    assert last.report.asked.unlabelled.total() == 20
    assert sum(map(len, encoder.batches)) == 20 * 5, "each view is read"
    assert max(sum(map(tokens_read, batch)) for batch in encoder.batches) <= CHUNK_TOKENS


ENCODER = FakeEncoder({"east": EAST})
STRICT = IndexSettings(requires_approval=True)
BY_LISTS = IndexSettings(requires_approval=True, exact_rows=0, side_rows=0)
POISON = record_of("poison", EAST, tenant="mallory", own_scores=(0.25,) * 5)
HONEST = record_of("honest", NORTH, tenant="acme")


def chosen(retriever: Retriever, tenant: str) -> list[str]:
    [route] = retriever.route([RouteRequest("east", tenant=tenant)])
    assert isinstance(route, Route)
    assert [candidate.ref.name for candidate in route.candidates] == names(route)
    return names(route)


def approved(record: AdapterRecord) -> AdapterRecord:
    return replace(record, approved=True)


@pytest.mark.parametrize("settings", [STRICT, BY_LISTS], ids=["exact", "lists"])
def test_only_an_approved_adapter_is_chosen_for_other_tenants(settings: IndexSettings) -> None:
    source = Source(POISON, approved(HONEST))
    pools = live_pool(ENCODER, source, settings=settings, background=lambda work: work())
    assert (pools.current.index.lists is not None) == (settings is BY_LISTS)
    retriever = Retriever(pools, min_score=-1.0, temperature=TEMPERATURE)
    assert chosen(retriever, "acme") == ["honest"]
    assert chosen(retriever, "mallory") == ["poison", "honest"]
    assert [c.ref.name for c in retriever.neighbours(embedding_of(EAST), 5, "acme")] == ["honest"]
    assert retriever.plan_named("acme", [("poison", 1.0)]).adapters[0].ref == POISON.ref  # it answers if named
    assert {record.ref.name for _, record in retriever.page("acme", PageRequest(9)).rows} == {"honest", "poison"}
    source.commit(approved(POISON), approved(HONEST))
    pools.catch_up()
    assert chosen(retriever, "acme") == ["poison", "honest"]
    source.commit(POISON, approved(HONEST))  # an update without review
    pools.catch_up()
    assert chosen(retriever, "acme") == ["honest"]


def test_the_doctor_queries_only_adapters_that_may_be_chosen() -> None:
    pool = live_pool(ENCODER, Source(POISON, approved(HONEST)), settings=STRICT).current
    *_, last = examine(pool, "acme", lambda record: [Sample("east")])
    assert last.report is not None
    assert [finding.ref.name for finding in last.report.adapters] == ["honest"]
    assert last.report.never_chosen == ()


def kept_versions(*visibilities: str) -> tuple[AdapterRecord, ...]:
    """Return the versions of one name, the live one first."""
    return tuple(
        record_of("n", NORTH, tenant="a", version=str(n), visibility=visibility)
        for n, visibility in enumerate(visibilities)
    )


def retriever_with_history(*versions: AdapterRecord) -> Retriever:
    source = Source()
    source.commit(versions[0], previous={("a", "n"): versions[1:]})
    return Retriever(live_pool(FakeEncoder(TABLE), source))


def test_a_digest_also_names_kept_versions() -> None:
    versions = kept_versions("public", "public", "public")
    retriever = retriever_with_history(*versions)
    for version in versions:
        assert retriever.resolve("a", f"n@{version.ref.digest[:8]}") == version
        plan = retriever.plan_named("b", [(f"a/n@{version.ref.digest}", 1.0)])
        assert [adapter.ref for adapter in plan.adapters] == [version.ref]
    assert retriever.resolve("a", "n") == versions[0]
    assert retriever.versions("b", "n") == (2, list(versions))


def test_a_version_that_was_private_stays_private() -> None:
    versions = kept_versions("public", "private")
    retriever = retriever_with_history(*versions)
    assert retriever.resolve("a", f"n@{versions[1].ref.digest}") == versions[1]
    assert retriever.versions("a", "n") == (2, list(versions))
    assert retriever.versions("b", "n") == (2, [versions[0]])
    with pytest.raises(AdapterNotFound):
        retriever.resolve("b", f"a/n@{versions[1].ref.digest}")


def test_a_withdrawn_adapter_has_no_versions() -> None:
    with pytest.raises(AdapterNotFound):
        retriever_of(*POOL).versions(LOCAL_TENANT, "gone")
