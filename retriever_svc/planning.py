"""Make a Plan from matches, or from the names that a client chose."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import TypeVar

from lora_store.adapter import AdapterRef
from lora_store.errors import AdapterNotFound, PlanInvalid
from lora_store.names import NamedPolicy, find_first_adapter, shorten_policy
from lora_store.plan import Plan, PlannedAdapter
from lora_store.records import AdapterRecord
from lora_store.snapshot import Snapshot
from lora_store.strategies.registry import STRATEGIES, Strategy
from lora_store.trials import TrialVersion
from retriever_svc.errors import PlanGone
from retriever_svc.index import Match
from retriever_svc.route import STICKY_MARGIN, Candidate, PinnedAdapter, RouteRequest
from retriever_svc.served_bases import EVERY_BASE, ServedBases
from retriever_svc.weightings import WEIGHTINGS

_MIN_DIGEST_CHARS = 8
M = TypeVar("M", Match, Candidate)


def routed_plan(
    request: RouteRequest, matches: Sequence[Match], generation: int, temperature: float, base_model: str = ""
) -> Plan:
    """Return the plan of the matches that get a weight. `matches`: at least one, best first, all of `base_model`."""
    strategy = STRATEGIES[request.strategy]
    considered = matches[: strategy.most_adapters]
    weights = WEIGHTINGS[request.weighting].weigh(considered, request.tenant, temperature)
    final = strategy.choose(weights, strategy.read_options(request.options, {}))
    planned = [(match, weight) for match, weight in zip(considered, final, strict=True) if weight]
    rows = tuple(
        PlannedAdapter(match.record.ref, match.record.weights_digest, weight, match.score) for match, weight in planned
    )
    records = [match.record for match, _ in planned]
    return replace(_make_plan(request.strategy, rows, generation, records), base_model=base_model)


def led_by(preferred: AdapterRef | None, matches: list[M]) -> list[M]:
    """Return the matches without those before the preferred adapter, or `matches` itself if it does not stay the best.

    It stays if the best match scores higher by at most `STICKY_MARGIN`. An adapter that was updated is another version
    of the same name, so it stays as well.
    """
    key = None if preferred is None else preferred.key
    places = (place for place, m in enumerate(matches) if m.ref.key == key)
    place = next(places, 0)
    is_close = place > 0 and matches[0].score - matches[place].score <= STICKY_MARGIN
    return matches[place:] if is_close else matches


def may_be_led(matches: list[M]) -> bool:
    """Return whether another match than the best one would lead if it were preferred."""
    return any(led_by(match.ref, matches) is not matches for match in matches)


def named_plan(
    snapshot: Snapshot,
    tenant: str,
    choices: Sequence[tuple[str, float]],
    strategy: Strategy,
    *,
    owner_names: bool = False,
    bases: ServedBases = EVERY_BASE,
) -> Plan:
    """Return the plan of the adapters that `tenant` names, with weights as given.

    Raises: AdapterNotFound, as `resolve_version` does; AdapterIncompatible for one of another base model; PlanInvalid
    if these adapters cannot form a plan.
    """
    records = [resolve_version(snapshot, tenant, name, owner_names=owner_names) for name, _ in choices]
    base_model = _common_base(records, [name for name, _ in choices], bases)
    rows = tuple(
        PlannedAdapter(record.ref, record.weights_digest, weight)
        for record, (_, weight) in zip(records, choices, strict=True)
    )
    plan = _make_plan(strategy, rows, snapshot.generation_for(tenant), records)
    plan = replace(plan, base_model=base_model)
    live = {record.ref for record, (name, _) in zip(records, choices, strict=True) if "@" not in name}
    return with_trials(plan, snapshot, tenant, live, bases=bases)


def with_trials(
    plan: Plan,
    snapshot: Snapshot,
    tenant: str,
    live: Collection[AdapterRef],
    *,
    requires_approval: bool = False,
    bases: ServedBases = EVERY_BASE,
) -> Plan:
    """Return the plan with the versions that may answer in place of those in `live`, which no client pinned.

    `requires_approval`: other tenants get approved versions alone.
    """
    digests = {row.weights_digest for row in plan.adapters}
    found: list[TrialVersion] = []
    for row in plan.adapters:
        versions = snapshot.versions(row.ref.key) if row.ref in live else ()
        if not versions or (trial := versions[0].trial) is None or versions[0].ref != row.ref:
            continue
        for record in versions[1:]:
            is_open = row.ref.tenant == tenant or record.is_open(requires_approval=requires_approval)
            is_other = record.weights_digest not in digests - {row.weights_digest}  # a plan has no weights twice
            is_of_base = bases.find(record.base_model) == bases.find(versions[0].base_model)
            if record.ref.digest == trial.digest and is_open and is_other and is_of_base:
                found.append(TrialVersion(row.ref, record.ref, record.weights_digest, trial))
                digests.add(record.weights_digest)
    return replace(plan, trials=tuple(found)) if found else plan


def replayed_plan(
    snapshot: Snapshot,
    tenant: str,
    strategy: Strategy,
    pinned: Sequence[PinnedAdapter],
    generation: int,
    *,
    bases: ServedBases = EVERY_BASE,
) -> Plan:
    """Return the plan that was made at `generation`, with exactly the versions that it pinned.

    Raises: PlanGone if a version is not kept or not visible to `tenant`; AdapterIncompatible for one of another base
    model; PlanInvalid if these cannot form a plan.
    """
    records = [_kept_version(snapshot, tenant, item) for item in pinned]
    base_model = _common_base(records, [item.name for item in pinned], bases)
    rows = tuple(
        PlannedAdapter(record.ref, record.weights_digest, item.weight, item.score)
        for record, item in zip(records, pinned, strict=True)
    )
    return replace(_make_plan(strategy, rows, generation, records), base_model=base_model)


def _kept_version(snapshot: Snapshot, tenant: str, pinned: PinnedAdapter) -> AdapterRecord:
    """Return the pinned version of the caller's own adapter, or of the public one if the plan is older than the own."""
    now = datetime.now(UTC)
    owner, slash, bare = pinned.name.rpartition("/")
    public = snapshot.public.get(pinned.name)
    keys = [(owner, bare)] if slash else [(tenant, pinned.name)]
    keys += [] if public is None else [public.ref.key]
    for record in [record for key in keys for record in snapshot.versions(key)]:
        if record.ref.digest == pinned.digest and record.is_visible_to(tenant) and not record.is_expired(now):
            return record
    raise PlanGone(pinned.name, pinned.digest)


def resolve(snapshot: Snapshot, tenant: str, name: str, *, owner_names: bool) -> AdapterRecord:
    """Return the live adapter that `tenant` means by `name`. With `owner_names` a bare name means its own adapter only.

    Raises: AdapterNotFound, with the name of a visible adapter as a hint if one is similar.
    """
    try:
        return _resolve_exactly(snapshot, tenant, name, owner_names=owner_names)
    except AdapterNotFound as exc:
        raise AdapterNotFound(name, _similar_name(snapshot, tenant, name)) from exc


def _resolve_exactly(snapshot: Snapshot, tenant: str, name: str, *, owner_names: bool) -> AdapterRecord:
    record = snapshot.resolve(tenant, f"{tenant}/{name}" if owner_names and "/" not in name else name)
    if record.is_expired(datetime.now(UTC)):
        raise AdapterNotFound(name)
    return record


def _similar_name(snapshot: Snapshot, tenant: str, name: str) -> str:
    """Return the name of a visible adapter that differs in its owner, in case or in - and _ only, or "".

    The hint never names the owner of another tenant's unlisted adapter: only those who know its whole name may use it.
    """
    for spelling in dict.fromkeys((name, name.replace("-", "_"), name.replace("_", "-"), name.lower())):
        with suppress(AdapterNotFound):
            found = snapshot.resolve(tenant, spelling)
            if not found.is_unlisted or found.ref.tenant == tenant:
                return found.ref.name_for(tenant)
    return ""


def resolve_version(snapshot: Snapshot, tenant: str, wanted: str, *, owner_names: bool = False) -> AdapterRecord:
    """Return the version that `tenant` means by `name` or `owner/name`, optionally followed by `@digest`.

    Without a digest this is the live version, with one a kept version. A digest may be shortened to 8 characters.
    Raises: AdapterNotFound if the adapter is not live or not visible to this tenant, or if the version is not kept.
    """
    name, at, digest = wanted.partition("@")
    try:
        live = resolve(snapshot, tenant, name, owner_names=owner_names)
    except AdapterNotFound as exc:
        raise AdapterNotFound(wanted, exc.hint) from exc
    if not at:
        return live
    for record in snapshot.versions(live.ref.key):
        matches = len(digest) >= _MIN_DIGEST_CHARS and record.ref.digest.startswith(digest)
        if matches and record.is_visible_to(tenant):  # an older version may be private
            return record
    raise AdapterNotFound(wanted)


def named_policies(snapshot: Snapshot, tenant: str, model: str, *, owner_names: bool = False) -> list[NamedPolicy]:
    """Return the kept policies of a model name, given as `name`, `owner/name` or `name@digest`, newest first.

    Return [] if `tenant` may use none that is called so. A digest may be shortened to 8 characters.
    """
    name, at, digest = model.partition("@")
    found = snapshot.policies(tenant, f"{tenant}/{name}" if owner_names and "/" not in name else name)
    if not at:
        return list(found)
    return [named for named in found if len(digest) >= _MIN_DIGEST_CHARS and named.ref.digest.startswith(digest)]


def with_base(snapshot: Snapshot, tenant: str, named: NamedPolicy, bases: ServedBases) -> NamedPolicy:
    """Return the policy with the base model of the adapter that it names, if the tenant sees it and several are served.

    The adapter is looked up as the policy's owner names it.
    """
    wanted = find_first_adapter(named.policy) if bases.are_several else ""
    if not wanted:
        return named
    with suppress(AdapterNotFound):  # it may be gone
        record = resolve_version(snapshot, named.ref.tenant, wanted)
        if record.is_visible_to(tenant):
            return replace(named, base_model=bases.name_in_plans(record.base_model))
    return named


def visible_names(
    snapshot: Snapshot, tenant: str, after: str = "", limit: int | None = None, *, is_short: bool = False
) -> list[NamedPolicy]:
    """Return the newest policy of each model name that `tenant` may use: its own, then others'.

    `after`: the name before the first one. `is_short`: as `shorten_policy` returns them.
    """
    own = {key for key in snapshot.names if key[0] == tenant}
    places = sorted((owner != tenant, owner, name) for owner, name in {*own, *snapshot.approved_names.values()})
    if after:
        owner, _, name = after.rpartition("/")
        places = places[bisect_right(places, (owner not in ("", tenant), owner or tenant, name)) :]
    found = [snapshot.policies(tenant, f"{owner}/{name}")[0] for _, owner, name in places[:limit]]
    return [replace(named, policy=shorten_policy(named.policy)) for named in found] if is_short else found


def _common_base(records: Sequence[AdapterRecord], names: Sequence[str], bases: ServedBases) -> str:
    """Return what plans call the base model of the adapters that a client calls `names`.

    Raises: AdapterIncompatible for one of another base model; PlanInvalid if they have several.
    """
    found = {bases.check(record, name): name for record, name in zip(records, names, strict=True)}
    if len(found) > 1:
        listed = ", ".join(f"{name!r} for {base!r}" for base, name in found.items())
        raise PlanInvalid(f"the adapters of a plan must have one base model, got {listed}; name those of one")
    return bases.name_in_plans(records[0].base_model if records else "")


def _make_plan(
    strategy: Strategy, rows: tuple[PlannedAdapter, ...], generation: int, records: Sequence[AdapterRecord]
) -> Plan:
    """Return the plan with the template that all its adapters name, and the contract of the one that leads it."""
    templates = {record.template for record in records}
    plan = Plan(strategy, rows, generation, templates.pop() if len(templates) == 1 else None)
    contracts = {record.ref: record.contract for record in records if record.contract is not None}
    leader = plan.leader if contracts else None
    return plan if leader is None else replace(plan, contract=contracts.get(leader.ref))
