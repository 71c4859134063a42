"""How matches, or the names a client chose, become a Plan."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_store.errors import AdapterNotFound
from lora_store.plan import Plan, PlannedAdapter, Strategy
from lora_store.records import AdapterRecord
from lora_store.snapshot import Snapshot
from retriever_svc.errors import PlanGone
from retriever_svc.index import Match
from retriever_svc.route import PinnedAdapter, RouteRequest, Weighting

_MIN_DIGEST_CHARS = 8


def routed_plan(request: RouteRequest, matches: Sequence[Match], generation: int, temperature: float) -> Plan:
    """The plan of the best match (`selection`), or of all of them. `matches` come best first, at least one."""
    planned = matches[:1] if request.strategy == "selection" else matches
    weights = _weights([match.score for match in planned], request.weighting, temperature)
    rows = tuple(
        PlannedAdapter(match.record.ref, match.record.weights_digest, weight, match.score)
        for match, weight in zip(planned, weights, strict=True)
    )
    return Plan(request.strategy, rows, generation, _common_template([match.record for match in planned]))


def named_plan(
    snapshot: Snapshot,
    tenant: str,
    choices: Sequence[tuple[str, float]],
    strategy: Strategy,
    *,
    owner_names: bool = False,
) -> Plan:
    """The plan of what `tenant` means by each name, weights as given.

    Raises: AdapterNotFound: as `resolve_version`. PlanInvalid: no plan can hold these.
    """
    records = [resolve_version(snapshot, tenant, name, owner_names=owner_names) for name, _ in choices]
    rows = tuple(
        PlannedAdapter(record.ref, record.weights_digest, weight)
        for record, (_, weight) in zip(records, choices, strict=True)
    )
    return Plan(strategy, rows, snapshot.generation_for(tenant), _common_template(records))


def replayed_plan(
    snapshot: Snapshot, tenant: str, strategy: Strategy, pinned: Sequence[PinnedAdapter], generation: int
) -> Plan:
    """The plan that was made at `generation`, from exactly the versions it pinned.

    Raises: PlanGone: a version is not kept, or not visible to `tenant`. PlanInvalid: no plan can hold these.
    """
    records = [_kept_version(snapshot, tenant, item) for item in pinned]
    rows = tuple(
        PlannedAdapter(record.ref, record.weights_digest, item.weight, item.score)
        for record, item in zip(records, pinned, strict=True)
    )
    return Plan(strategy, rows, generation, _common_template(records))


def _kept_version(snapshot: Snapshot, tenant: str, pinned: PinnedAdapter) -> AdapterRecord:
    """Of the caller's own adapter of that name, or of the public one: the plan may be older than either."""
    owner, slash, bare = pinned.name.rpartition("/")
    public = snapshot.public.get(pinned.name)
    keys = [(owner, bare)] if slash else [(tenant, pinned.name)]
    keys += [] if public is None else [(public.ref.tenant, public.ref.name)]
    for record in [record for key in keys for record in snapshot.versions(key)]:
        if record.ref.digest == pinned.digest and record.is_visible_to(tenant):
            return record
    raise PlanGone(pinned.name, pinned.digest)


def resolve(snapshot: Snapshot, tenant: str, name: str, *, owner_names: bool) -> AdapterRecord:
    """Return the live adapter `tenant` means by `name`: with `owner_names` a bare name is its own adapter's alone.

    Raises: AdapterNotFound, with the name of another tenant's public adapter as a hint.
    """
    if not owner_names or "/" in name:
        return snapshot.resolve(tenant, name)
    try:
        return snapshot.resolve(tenant, f"{tenant}/{name}")
    except AdapterNotFound as exc:
        public = snapshot.public.get(name)
        raise AdapterNotFound(name, "" if public is None else public.ref.name_for(tenant)) from exc


def resolve_version(snapshot: Snapshot, tenant: str, wanted: str, *, owner_names: bool = False) -> AdapterRecord:
    """The version `tenant` means by `name` or `owner/name`: the live one, or the kept one whose digest follows an `@`.

    A digest may be cut short to 8 characters or more.
    Raises: AdapterNotFound: nothing live, nothing this tenant may see, or no kept version of that digest.
    """
    name, at, digest = wanted.partition("@")
    try:
        live = resolve(snapshot, tenant, name, owner_names=owner_names)
    except AdapterNotFound as exc:
        raise AdapterNotFound(wanted, exc.hint) from exc
    if not at:
        return live
    for record in snapshot.versions((live.ref.tenant, live.ref.name)):
        matches = len(digest) >= _MIN_DIGEST_CHARS and record.ref.digest.startswith(digest)
        if matches and record.is_visible_to(tenant):  # it may have been private then
            return record
    raise AdapterNotFound(wanted)


def _weights(scores: Sequence[float], weighting: Weighting, temperature: float) -> list[float]:
    """`uniform`: w_i = 1/n. `softmax`: w_i = exp(s_i / T) / Σ_j exp(s_j / T). Scores come best first."""
    if weighting == "uniform":
        return [1 / len(scores)] * len(scores)
    parts = [math.exp((score - scores[0]) / temperature) for score in scores]
    return [part / sum(parts) for part in parts]


def _common_template(records: Sequence[AdapterRecord]) -> str | None:
    templates = {record.template for record in records}
    return templates.pop() if len(templates) == 1 else None
