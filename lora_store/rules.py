"""The rules for writers of the catalogue. Each checks a request against one snapshot and returns the events for it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Literal

import numpy as np

from lora_store.adapter import AdapterRef
from lora_store.errors import (
    AdapterNotFound,
    AdapterRefused,
    EncoderIncomplete,
    NameTaken,
    PublicNameTaken,
    QuotaExceeded,
    VersionConflict,
)
from lora_store.events import (
    ActivateEncoder,
    Approve,
    Embed,
    Event,
    Publish,
    Rank,
    SetName,
    SetTrial,
    SetVisibility,
    Withdraw,
)
from lora_store.names import KEPT_POLICIES, MAX_NAMES, NamedPolicy
from lora_store.quota import TenantQuota, check_quota
from lora_store.rankings import OUTCOME, RankedAdapter, Ranking
from lora_store.records import AdapterRecord, Embedding, Visibility
from lora_store.snapshot import ActiveEncoder, Key, Snapshot
from lora_store.staging import Kept, take_over
from lora_store.trials import Trial

EXPIRY = "expiry"  # the author of withdrawals at the end of a time to live
Precondition = Literal["any", "live", "kept"]
"""The condition for publishing a version: none; "live": skip versions that are not live; "kept": fail for versions
that are not kept."""


def publish_events(
    snapshot: Snapshot,
    records: Sequence[AdapterRecord],
    precondition: Precondition = "any",
    *,
    keeps: Mapping[AdapterRef, Collection[Kept]] | None = None,
    quota: TenantQuota | None = None,
    replaces: Mapping[AdapterRef, str] | None = None,
) -> list[Event]:
    """Return publish events for the records that are not live yet. Check each record against earlier ones as well.

    `keeps`: for each version, the fields that it took over from the live version of its name. If one of them is the
    visibility, it is read from the version that is live now. The same holds for every offered version and with the
    precondition "live". `quota`: applies to each tenant. `replaces`: the digest that must be live now, by the version
    that was made from it.
    Raises: PublicNameTaken; AdapterRefused for an unlisted version of a listed adapter; QuotaExceeded; AdapterNotFound
    for a version that must be kept and is not; VersionConflict if the live version has other tags, another template,
    another contract or other samples than those that were taken over, or another version is live than the one of
    `replaces`.
    """
    taken = keeps or {}
    if precondition == "live":
        records = [record for record in records if _kept(snapshot, record)[:1] == [record.ref]]
    for record in records if precondition == "kept" else ():
        if record.ref not in _kept(snapshot, record):
            raise AdapterNotFound(f"{record.ref.name}@{record.ref.short_digest}")
    for ref, digest in (replaces or {}).items():
        now = snapshot.records.get(ref.key)
        if now is None or now.ref.digest not in (digest, ref.digest):
            raise VersionConflict(1)
    live: dict[Key, AdapterRecord] = {}
    owners: dict[str, str] = {}
    events: list[Event] = []
    for record in records:
        key, name = record.ref.key, record.ref.name
        current = live.get(key, snapshot.records.get(key))
        if record.is_offered:
            _check_offer(record, current)
        was_live = snapshot.records.get(key) if precondition == "any" else None
        if was_live is not None and take_over(record, was_live, taken.get(record.ref, ())) != record:
            raise VersionConflict(1)
        if current is not None:
            keeps_visibility = precondition == "live" or "visibility" in taken.get(record.ref, ())
            record = _successor(record, current, precondition, keeps_visibility=keeps_visibility)
        record = _dated(record, current, snapshot.versions(key))
        if current is None:
            _check_unnamed(snapshot, key)
        if record.visibility == "public":
            owner = owners.setdefault(name, find_owner(snapshot, name, record.ref.tenant))
            _check_claim(name, record.ref.tenant, owner)
        if record.is_offered:
            events.append(Publish(record))
        elif current is None or _essence(current) != _essence(record):
            live[key] = record
            events.append(Publish(record))
    if quota is not None:
        check_quota(snapshot, [event.record for event in events if isinstance(event, Publish)], quota)
    return events


def _successor(
    record: AdapterRecord, live: AdapterRecord, precondition: Precondition, *, keeps_visibility: bool
) -> AdapterRecord:
    """Return the version with what it takes over from the live one of its name. Raises: AdapterRefused."""
    if precondition == "kept":
        record = replace(record, expires_at=live.expires_at)
    if record.is_unlisted and not live.is_unlisted:
        reason = "a listed adapter has this name: choose another one for an unlisted adapter"
        raise AdapterRefused(record.ref.name, [reason])
    if keeps_visibility or record.is_offered:
        record = replace(record, visibility=live.visibility)
    if not record.is_offered and live.ref == record.ref:
        record = replace(record, trial=live.trial)
    return record


def _dated(record: AdapterRecord, live: AdapterRecord | None, kept: Iterable[AdapterRecord]) -> AdapterRecord:
    """Return a version that is kept already with the time of its first publish, and since when it is live."""
    earlier = next((version for version in kept if version.ref == record.ref), None)
    if earlier is None:
        return record
    is_live = live is not None and live.ref == record.ref
    since = earlier.live_since if is_live or record.is_offered else record.created_at
    return replace(record, created_at=earlier.created_at, live_since=since)


def _check_offer(record: AdapterRecord, live: AdapterRecord | None) -> None:
    """Raises: AdapterRefused if this version cannot take a share of the live one's requests."""
    name = record.ref.name
    if live is None:
        reason = "no live version exists to share requests with; publish this version without `share`"
        raise AdapterRefused(name, [reason])
    if live.ref == record.ref:
        raise AdapterRefused(name, ["this version is live already: a share goes to another version"])
    if live.is_unlisted or record.is_unlisted:
        raise AdapterRefused(name, ["an unlisted adapter cannot share its requests"])
    if live.template != record.template:
        given = (repr(version.template) if version.template else "the server's template" for version in (live, record))
        reason = "the live version uses {}, this one {}: versions that share requests need the same template"
        raise AdapterRefused(name, [reason.format(*given)])
    if live.contract != record.contract:
        reason = "its contract differs from the live version's: versions that share requests need the same one"
        raise AdapterRefused(name, [reason])


def find_owner(snapshot: Snapshot, name: str, claimant: str) -> str:
    """Return the tenant whose public adapter or approved model name is called so, or `claimant` without any."""
    public = snapshot.public.get(name)
    owner, _ = snapshot.approved_names.get(name, (claimant, name))
    return owner if public is None else public.ref.tenant


def _check_unnamed(snapshot: Snapshot, key: Key) -> None:
    """Raises: PublicNameTaken for a new adapter that is called like a model name of its tenant."""
    if key in snapshot.names:
        reason = f"{key[1]!r} is a model name: choose another name for the adapter, or remove the model name first"
        raise PublicNameTaken(key[1], [reason])


def _check_claim(name: str, claimant: str, owner: str) -> None:
    if owner != claimant:
        raise PublicNameTaken(
            name,
            [f"the public name {name!r} belongs to another tenant: choose another name, or publish it as private"],
        )


def _kept(snapshot: Snapshot, record: AdapterRecord) -> list[AdapterRef]:
    """Return the kept versions of the record's name, the live one first."""
    return [version.ref for version in snapshot.versions(record.ref.key)]


def withdraw_events(snapshot: Snapshot, keys: Iterable[Key], actor: str, at: datetime) -> list[Withdraw]:
    """Return one event per name. Raises: AdapterNotFound for the first name that is not live."""
    events: list[Withdraw] = []
    for key in dict.fromkeys(keys):
        if key not in snapshot.records:
            raise AdapterNotFound(key[1])
        events.append(Withdraw(snapshot.records[key].ref, actor, at))
    return events


def expire_events(snapshot: Snapshot, at: datetime) -> list[Withdraw]:
    """Return the withdrawals of the unlisted adapters whose time to live is over."""
    return [Withdraw(record.ref, EXPIRY, at) for record in snapshot.records.values() if record.is_expired(at)]


def visibility_events(snapshot: Snapshot, key: Key, visibility: Visibility, actor: str, at: datetime) -> list[Event]:
    """Return the event; nothing if the name has this visibility already. Raises: AdapterNotFound, PublicNameTaken."""
    record = snapshot.records.get(key)
    if record is None:
        raise AdapterNotFound(key[1])
    if visibility == "public":
        _check_claim(key[1], key[0], find_owner(snapshot, key[1], key[0]))
    kept = snapshot.versions(key) if visibility == "private" else (record,)
    if all(version.visibility == visibility for version in kept):
        return []
    return [SetVisibility(record.ref, visibility, actor, at)]


def trial_events(snapshot: Snapshot, key: Key, trial: Trial | None, actor: str, at: datetime) -> list[Event]:
    """Return the event that starts, changes or ends the trial of a name; nothing if it is so already.

    Raises: AdapterNotFound for a name that is not live, or a version that is not kept; AdapterRefused.
    """
    live = snapshot.records.get(key)
    if live is None:
        raise AdapterNotFound(key[1])
    if trial is not None:
        kept = [record for record in snapshot.versions(key) if record.ref.digest == trial.digest]
        if not kept:
            raise AdapterNotFound(f"{key[1]}@{trial.digest[:12]}")
        _check_offer(kept[0], live)
    return [] if live.trial == trial else [SetTrial(live.ref, trial, actor, at)]


def approve_events(snapshot: Snapshot, refs: Iterable[AdapterRef], actor: str, at: datetime) -> list[Event]:
    """Return one event per version that is not approved yet.

    Raises: AdapterNotFound for a version that is not live or not public: the admin reviewed something else.
    """
    events: list[Event] = []
    for ref in dict.fromkeys(refs):
        record = snapshot.live(ref)
        if record is None or record.visibility != "public":
            raise AdapterNotFound(f"{ref.name}@{ref.short_digest}")
        if not record.approved:
            events.append(Approve(ref, actor, at))
    return events


def name_events(snapshot: Snapshot, named: NamedPolicy) -> list[Event]:
    """Return the events that make this policy the newest of its name, or remove it; nothing if it is that already.

    A policy that is kept as an approved version stays approved. The newest approved version stays kept.
    Raises: NameTaken, QuotaExceeded; AdapterNotFound for a name to remove that does not exist.
    """
    key = named.ref.key
    kept = snapshot.names.get(key, ())
    if not named.policy:
        if not kept:
            raise AdapterNotFound(key[1])
        return [SetName(named)]
    if kept and kept[0].ref == named.ref:
        return []
    if not kept:  # what other tenants publish or approve later does not stop the owner from changing its name
        _check_no_adapter(snapshot, key)
        if (num := sum(tenant == key[0] for tenant, _ in snapshot.names)) >= MAX_NAMES:
            raise QuotaExceeded("model names", num + 1, MAX_NAMES, "remove a model name first")
    was_approved = any(old.approved for old in kept if old.ref == named.ref)
    return [*_keep_approved(kept, named), SetName(replace(named, approved=was_approved))]


def _keep_approved(kept: Sequence[NamedPolicy], named: NamedPolicy) -> list[Event]:
    """Return the events without which `named` would push out the newest approved version, which other tenants use.

    They put it behind the newest version, to which a rollback of `named` returns. They are events of their own, so that
    servers of any release that read them keep the same versions.
    """
    approved = next((old for old in kept if old.approved), None)
    pushed_out = [old for old in kept if old.ref != named.ref][KEPT_POLICIES - 1 :]
    return [SetName(approved), SetName(kept[0])] if approved in pushed_out else []


def _check_no_adapter(snapshot: Snapshot, key: Key) -> None:
    """Raises: NameTaken if the name's tenant uses an adapter, or another tenant's model name, by this name."""
    name = key[1]
    if key in snapshot.records or name in snapshot.public:
        raise NameTaken(name, "an adapter")
    if snapshot.approved_names.get(name, key) != key:
        raise NameTaken(name, "a model name of another tenant")


def approve_name_events(snapshot: Snapshot, ref: AdapterRef) -> list[Event]:
    """Return the event that lets every tenant use this version of a name.

    Raises: AdapterNotFound for a version that is not kept; NameTaken.
    """
    key = ref.key
    found = [named for named in snapshot.names.get(key, ()) if named.ref == ref]
    if not found:
        raise AdapterNotFound(f"{ref.tenant}/{ref.name}@{ref.short_digest}")
    _check_no_adapter(snapshot, key)
    return [] if found[0].approved else [SetName(replace(found[0], approved=True))]


def embed_events(snapshot: Snapshot, embeddings: Mapping[AdapterRef, Embedding]) -> list[Event]:
    """Return embed events for the versions that are live and not embedded by that encoder yet."""
    return [
        Embed(ref, embedding)
        for ref, embedding in embeddings.items()
        if (record := snapshot.live(ref)) is not None and not snapshot.is_embedded(record, embedding.encoder)
    ]


def activate_events(snapshot: Snapshot, encoder: ActiveEncoder, actor: str, at: datetime) -> list[Event]:
    """Return the event, or nothing if the encoder is active already.

    Raises: EncoderIncomplete if an adapter with samples has no embedding by this encoder.
    """
    if snapshot.encoder == encoder:
        return []
    missing = [
        record.ref
        for record in snapshot.records.values()
        if record.num_samples and not snapshot.is_embedded(record, encoder.identity)
    ]
    if missing:
        raise EncoderIncomplete(missing)
    return [ActivateEncoder(encoder.model, encoder.identity, actor, at)]


def rank_events(
    snapshot: Snapshot,
    tenant: str,
    rankings: Sequence[Ranking],
    actor: str,
    at: datetime,
    *,
    are_outcomes: bool = False,
    keeps: Collection[AdapterRef] = (),
) -> list[Event]:
    """Return events that replace the rankings of `tenant` that an evaluation made, or those of its outcomes.

    Nothing is returned if they are the same: each event replaces all rankings of the tenant.
    `keeps`: the anchors whose earlier rankings stay. An evaluation also keeps an earlier ranking if its anchor was
    withdrawn and one of its adapters is still live: its examples cannot be measured again, and they show what the
    adapter is for.
    Raises: VersionConflict if another encoder was activated since these outcomes were read.
    """
    active = snapshot.encoder
    if are_outcomes and active is not None and any(ranking.encoder != active.identity for ranking in rankings):
        raise VersionConflict(1)
    live = {record.ref for record in snapshot.records.values()}
    earlier = [rank.ranking for rank in snapshot.rankings.get(tenant, ())]
    kept = [
        ranking
        for ranking in earlier
        if ranking.is_outcome != are_outcomes
        or ranking.anchor in keeps
        or (
            not ranking.is_outcome
            and ranking.anchor.key not in snapshot.records
            and any(item.ref in live for item in ranking.adapters)
        )
    ]
    wanted = [*rankings, *kept]
    if not wanted and earlier:
        wanted = [_naming_none(tenant, earlier[0])]
    if len(wanted) == len(earlier) and all(map(_is_same, wanted, earlier)):
        return []
    return [Rank(tenant, ranking, place == 0, actor, at) for place, ranking in enumerate(wanted)]


def _is_same(one: Ranking, other: Ranking) -> bool:
    """Return whether the rankings and their arrays are equal."""
    is_equal = one == other and np.array_equal(one.vector, other.vector)
    return is_equal and np.array_equal(one.own_scores, other.own_scores)


def _naming_none(tenant: str, ranking: Ranking) -> Ranking:
    """Return an outcome that changes no choice. It takes the place of the last rankings, since an event names one."""
    nobody = AdapterRef(tenant, OUTCOME, "")
    return replace(ranking, anchor=nobody, adapters=(RankedAdapter(nobody, 0.0, 0, False),))


def _essence(record: AdapterRecord) -> tuple[object, ...]:
    """Return the fields whose change makes a publish necessary."""
    return record.ref.digest, record.visibility, record.encoder, record.expires_at
