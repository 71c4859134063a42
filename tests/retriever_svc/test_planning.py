"""Plans that are replayed exactly or not at all, and the names in them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from lora_store.adapter import AdapterRef
from lora_store.errors import AdapterNotFound, PlanInvalid
from lora_store.names import NamedPolicy
from lora_store.plan import Plan, Strategy
from lora_store.records import AdapterRecord
from lora_store.snapshot import Snapshot
from lora_store.trials import Trial
from retriever_svc import PinnedAdapter, PlanGone, Retriever, ServedBases, StaleIndex
from retriever_svc.planning import (
    named_plan,
    replayed_plan,
    resolve,
    visible_names,
    with_base,
    with_trials,
)
from tests.retriever_svc.pool_fakes import record_of

NEW, OLD, GONE = (record_of("n", None, tenant="a", version=version, template="chat") for version in ("3", "2", "1"))
OTHER = record_of("o", None, tenant="b")
SECRET = record_of("s", None, tenant="b", visibility="private")
POOL = Snapshot(9, {(r.ref.tenant, r.ref.name): r for r in (NEW, OTHER, SECRET)}, previous={("a", "n"): (OLD,)})


def pinned(*records: AdapterRecord, weight: float = 0.5) -> list[PinnedAdapter]:
    return [PinnedAdapter(record.ref.name, record.ref.digest, weight, 0.25) for record in records]


def replay(strategy: Strategy, *records: AdapterRecord, tenant: str = "a", weight: float = 0.5) -> Plan:
    return replayed_plan(POOL, tenant, strategy, pinned(*records, weight=weight), 7)


@pytest.mark.parametrize("strategy", ["mixture", "fusion"])
def test_a_replayed_plan_has_its_versions_weights_scores_and_generation(strategy: Strategy) -> None:
    plan = replay(strategy, OLD, OTHER)
    assert (plan.strategy, plan.generation) == (strategy, 7)
    assert [(row.ref, row.weights_digest, row.weight, row.score) for row in plan.adapters] == [
        (record.ref, record.weights_digest, 0.5, 0.25) for record in (OLD, OTHER)
    ]


def test_a_replay_has_the_plans_template() -> None:
    for records in ([OLD], [NEW, OTHER]):
        choices = [(f"{record.ref.name}@{record.ref.digest}", 0.5) for record in records]
        strategy: Strategy = "selection" if len(records) == 1 else "mixture"
        assert replay(strategy, *records).template == named_plan(POOL, "a", choices, strategy).template
    assert replay("base") == Plan("base", generation=7)


@pytest.mark.parametrize(
    ("tenant", "record"),
    [("a", GONE), ("a", SECRET), ("a", record_of("never", None)), ("b", record_of("s", None, version="other"))],
    ids=["swept", "of another", "unknown", "tampered"],
)
def test_missing_and_invisible_versions_give_the_same_message(tenant: str, record: AdapterRecord) -> None:
    with pytest.raises(PlanGone) as caught:
        replay("selection", record, tenant=tenant)
    digest, name = record.ref.digest, record.ref.name
    version = f"version {digest[:12]!r} of adapter {name!r}"
    said = f"the plan cannot be replayed: {version} is no longer kept; request a new plan"
    assert str(caught.value) == said


def test_a_replay_ignores_a_new_own_namesake_and_a_formerly_private_version_of_others() -> None:
    was_private = record_of("o", None, tenant="b", visibility="private", version="0")
    pool = Snapshot(9, POOL.records, previous={("b", "o"): (was_private,)})
    assert replayed_plan(pool, "b", "selection", pinned(was_private), 1).adapters[0].ref == was_private.ref
    with pytest.raises(PlanGone):
        replayed_plan(pool, "a", "selection", pinned(was_private), 1)
    own = record_of("o", None, tenant="a", visibility="private")
    pool = Snapshot(9, {**POOL.records, ("a", "o"): own})
    for pins in (pinned(OTHER), [PinnedAdapter("b/o", OTHER.ref.digest, 1.0)]):
        assert replayed_plan(pool, "a", "selection", pins, 1).adapters[0].ref == OTHER.ref


@pytest.mark.parametrize(
    ("strategy", "records", "weight"),
    [
        ("mixture", [NEW], math.nan),
        ("mixture", [NEW], math.inf),
        ("mixture", [NEW], 4.01),
        ("selection", [NEW, OTHER], 0.5),
        ("selection", [], 0.5),
        ("base", [NEW], 0.5),
        ("sideways", [NEW], 0.5),
        ("mixture", [NEW, NEW], 0.5),
        ("mixture", [NEW] * 17, 0.5),
    ],
    ids=str,
)
def test_a_tampered_plan_is_invalid(strategy: Strategy, records: list[AdapterRecord], weight: float) -> None:
    with pytest.raises(PlanInvalid):
        replay(strategy, *records, weight=weight)


def test_a_plan_of_a_later_generation_is_replayed_as_its_versions_are_kept() -> None:
    retriever = Retriever(SimpleNamespace(current=SimpleNamespace(snapshot=POOL, bases=ServedBases())))  # type: ignore[arg-type]
    assert retriever.replay("a", "selection", pinned(OLD), 10, 9).adapters[0].ref == OLD.ref
    with pytest.raises(StaleIndex):
        retriever.replay("a", "selection", pinned(OLD), 10, 10)


@pytest.mark.parametrize(
    ("tenant", "name", "hint"),
    [
        ("acme", "date-format", "date_format"),
        ("acme", "Date_Format", "date_format"),
        ("globex", "date-format", "acme/date_format"),
        ("globex", "acme/date-format", "acme/date_format"),
        ("acme", "my_secret", ""),
        ("globex", "my-secret", "my_secret"),
        ("acme", "date", ""),
    ],
)
@pytest.mark.parametrize("owner_names", [False, True])
def test_an_unknown_name_suggests_a_visible_one_like_it(tenant: str, name: str, hint: str, owner_names: bool) -> None:
    shown, secret = record_of("date_format", None, tenant="acme"), record_of("my_secret", None, tenant="globex")
    secret = replace(secret, visibility="private")
    snapshot = Snapshot(1, {(r.ref.tenant, r.ref.name): r for r in (shown, secret)})
    with pytest.raises(AdapterNotFound) as caught:
        resolve(snapshot, tenant, name, owner_names=owner_names)
    assert (caught.value.wanted, caught.value.hint) == (name, hint)


@pytest.mark.parametrize(("tenant", "hint"), [("acme", "step_400"), ("globex", "")])
@pytest.mark.parametrize("name", ["step-400", "Step_400", "nobody/step_400"])
def test_an_unlisted_adapter_is_a_hint_for_its_own_tenant_only(tenant: str, hint: str, name: str) -> None:
    unlisted = replace(record_of("step_400", None, tenant="acme"), expires_at=datetime.now(UTC) + timedelta(hours=1))
    snapshot = Snapshot(1, {("acme", "step_400"): unlisted})
    with pytest.raises(AdapterNotFound) as caught:
        resolve(snapshot, tenant, name, owner_names=True)
    assert caught.value.hint == ("" if "/" in name else hint)
    assert resolve(snapshot, "globex", "acme/step_400", owner_names=True) is unlisted


def test_an_expired_adapter_is_found_by_no_name_and_no_plan() -> None:
    now = datetime.now(UTC)
    gone = replace(record_of("gone", None, tenant="a"), expires_at=now - timedelta(seconds=1))
    brief = replace(record_of("brief", None, tenant="a"), expires_at=now + timedelta(hours=1))
    pool = Snapshot(9, {(record.ref.tenant, record.ref.name): record for record in (gone, brief)})
    assert named_plan(pool, "a", [("brief", 1.0)], "selection").adapters[0].ref == brief.ref
    assert replayed_plan(pool, "a", "selection", pinned(brief), 9).adapters[0].ref == brief.ref
    with pytest.raises(AdapterNotFound):
        named_plan(pool, "a", [("gone", 1.0)], "selection")
    with pytest.raises(PlanGone):
        replayed_plan(pool, "a", "selection", pinned(gone), 9)


def trial_pool(offered: AdapterRecord, *others: AdapterRecord) -> Snapshot:
    """Return a pool in which a version of `n` takes a share of its requests."""
    live = replace(NEW, trial=Trial(offered.ref.digest, 0.5))
    return Snapshot(9, {(r.ref.tenant, r.ref.name): r for r in (live, *others)}, previous={("a", "n"): (offered,)})


def test_a_named_plan_offers_the_version_under_trial_unless_the_client_pinned_one() -> None:
    pool = trial_pool(OLD, OTHER)
    plan = named_plan(pool, "a", [("n", 0.5), ("o", 0.5)], "mixture")
    [version] = plan.trials
    assert (version.live, version.ref, version.weights_digest) == (NEW.ref, OLD.ref, OLD.weights_digest)
    replaced = plan.with_versions(plan.trials)
    assert [row.ref for row in replaced.adapters] == [OLD.ref, OTHER.ref]
    assert [row.weights_digest for row in replaced.adapters] == [OLD.weights_digest, OTHER.weights_digest]
    assert replaced.trials == ()
    for pin in (NEW, OLD):
        assert named_plan(pool, "a", [(f"n@{pin.ref.digest}", 1.0)], "selection").trials == ()
    assert replayed_plan(pool, "a", "selection", pinned(NEW), 7).trials == ()


def test_other_tenants_are_offered_only_what_they_may_use() -> None:
    private = replace(OLD, visibility="private")
    choices = [("a/n", 1.0)]
    assert named_plan(trial_pool(private), "b", choices, "selection").trials == ()
    assert len(named_plan(trial_pool(private), "a", choices, "selection").trials) == 1
    assert len(named_plan(trial_pool(OLD), "b", choices, "selection").trials) == 1
    plan = replace(named_plan(trial_pool(OLD), "b", choices, "selection"), trials=())
    for record, offered in ((OLD, 0), (replace(OLD, approved=True), 1)):
        found = with_trials(plan, trial_pool(record), "b", {NEW.ref}, requires_approval=True)
        assert len(found.trials) == offered
    same = replace(OTHER, weights_digest=OLD.weights_digest)  # weights that the plan has already
    assert named_plan(trial_pool(OLD, same), "a", [("n", 0.5), ("o", 0.5)], "mixture").trials == ()


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_pages_of_names_go_over_from_the_own_ones_to_those_of_others(limit: int) -> None:
    policies = [
        NamedPolicy(AdapterRef(owner, name, "d" * 64), "{}", "", datetime.now(UTC), approved=approved)
        for owner, name, approved in [
            *(("m", name, name == "b") for name in "zab"),
            *(("a", "y", True), ("a", "secret", False), ("z", "m", True), ("m2", "a2", True)),
        ]
    ]
    pool = Snapshot(9, {}, names={(named.ref.tenant, named.ref.name): (named,) for named in policies})
    found: list[str] = []
    while page := visible_names(pool, "m", found[-1] if found else "", limit):
        found += [named.ref.name_for("m") for named in page]
        assert len(found) <= 6
    assert found == ["a", "b", "z", "a/y", "m2/a2", "z/m"]


@pytest.mark.parametrize(("wanted", "seen_by"), [("b/o", ["a", "b"]), ("b/s", ["b"]), ("b/gone", [])])
def test_only_who_sees_the_adapter_of_a_name_is_told_its_base_model(wanted: str, seen_by: list[str]) -> None:
    base_model = OTHER.base_model
    bases = ServedBases({"first": {"first"}, "second": {base_model}})
    policy = json.dumps({"model": wanted})
    named = NamedPolicy(AdapterRef("b", "name", "d" * 64), policy, "", datetime.now(UTC), approved=True)
    found = {tenant: with_base(POOL, tenant, named, bases).base_model for tenant in ("a", "b")}
    assert found == {tenant: "second" if tenant in seen_by else "" for tenant in ("a", "b")}
    assert with_base(POOL, "b", named, ServedBases()).base_model == ""
