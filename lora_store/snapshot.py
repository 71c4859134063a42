"""The state of the pool at one generation, the result of all events up to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from lora_store.adapter import AdapterRef
from lora_store.errors import AdapterNotFound
from lora_store.events import (
    ActivateEncoder,
    Approve,
    Embed,
    Event,
    Fold,
    Keep,
    Publish,
    Rank,
    SetName,
    SetTrial,
    SetVisibility,
    VisibleChange,
    Withdraw,
)
from lora_store.names import KEPT_POLICIES, NamedPolicy
from lora_store.persistent_map import MapEditor, PersistentMap
from lora_store.records import AdapterRecord, Embedding, Visibility
from lora_store.tallies import Tallies, TalliesEditor

K = TypeVar("K")
V = TypeVar("V")
Key = tuple[str, str]  # (tenant, name)
EVERYBODY = ""  # no tenant has this name
# Versions that were live, per live name, including the live one; `name@digest`, replay and rollback can use these. One
# version that was only offered for a trial is kept beside them.
KEPT_VERSIONS = 3


@dataclass(frozen=True, slots=True)
class ActiveEncoder:
    """The encoder that a reindex activated: the model to load, and the identity stored with its embeddings."""

    model: str
    identity: str


@dataclass(frozen=True)
class Snapshot:
    """Every live adapter by (tenant, name), as of one generation. Immutable.

    `previous`: the older kept versions of a live name, newest first; names without any have no entry. `encoder`: None
    until a reindex activates one. `pending`: embeddings by an encoder that is not active yet.

    `visible_changes`: by tenant, the generation of the newest change that only this tenant could see; under EVERYBODY,
    that of the newest change that all tenants could see.

    `rankings`: by tenant, what its last evaluation measured. Only this tenant's `auto` uses it.

    `names`: by (tenant, name), the kept policies of each model name, the newest first.

    Generations share memory: the cost of `after` depends on what the events change, not on the number of adapters.
    """

    generation: int
    records: Mapping[Key, AdapterRecord]
    previous: Mapping[Key, tuple[AdapterRecord, ...]] = field(default_factory=dict)
    encoder: ActiveEncoder | None = None
    pending: Mapping[AdapterRef, Embedding] = field(default_factory=dict)
    visible_changes: Mapping[str, int] = field(default_factory=dict, compare=False)
    rankings: Mapping[str, tuple[Rank, ...]] = field(default_factory=dict)
    names: Mapping[Key, tuple[NamedPolicy, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("records", "previous", "pending", "visible_changes", "rankings", "names"):
            if not isinstance(getattr(self, name), PersistentMap):
                object.__setattr__(self, name, PersistentMap(getattr(self, name)))

    def __reduce__(self) -> tuple[type[Snapshot], tuple[object, ...]]:
        parts = (self.records, self.previous, self.encoder, self.pending, self.visible_changes, self.rankings)
        return Snapshot, (self.generation, *parts, self.names)  # no derived parts

    @cached_property
    def public(self) -> Mapping[str, AdapterRecord]:
        """The public adapters by bare name. Each bare name has one owner."""
        return PersistentMap({record.ref.name: record for record in self.records.values() if _is_public(record)})

    @cached_property
    def approved_names(self) -> Mapping[str, Key]:
        """The names with a version that every tenant may use, by bare name. Each bare name has one owner."""
        return {key[1]: key for key, kept in self.names.items() if any(named.approved for named in kept)}

    @cached_property
    def tallies(self) -> Tallies:
        """The use counts of blobs and the usage of tenants. Counted once; `after` then updates them."""
        return Tallies.of(map(self.versions, self.records))

    def generation_for(self, tenant: str) -> int:
        """Return the generation of the newest change that `tenant` can see. Other tenants' private changes don't count.

        Clients wait until this number reaches the generation that they want. A snapshot that was not read from a
        catalogue does not know when things changed, so it returns its own generation.
        """
        if not self.visible_changes:
            return self.generation
        return max(self.visible_changes.get(EVERYBODY, 0), self.visible_changes.get(tenant, 0))

    def resolve(self, tenant: str, name: str) -> AdapterRecord:
        """Return the adapter that `tenant` means by `name`: its own, or else the public one of that name.

        `owner/name` means the owner's adapter only. Raises: AdapterNotFound. An adapter that exists but is not visible
        to `tenant` gives the same error after the same work as one that does not exist.
        """
        owner, slash, bare = name.rpartition("/")
        found = self.records.get((owner, bare) if slash else (tenant, name))
        if found is None and not slash:
            found = self.public.get(name)
        if found is None or not found.is_visible_to(tenant):
            raise AdapterNotFound(name)
        return found

    def policies(self, tenant: str, name: str) -> tuple[NamedPolicy, ...]:
        """Return the kept versions of the model name that `tenant` means and may use, newest first; () without any.

        `name` is read as `resolve` reads it: the tenant's own model name or adapter comes before another tenant's name,
        of which only the approved versions may be used.
        """
        owner, slash, bare = name.rpartition("/")
        key = (owner, bare) if slash else (tenant, name)
        if not slash and key not in self.names and key not in self.records:
            key = self.approved_names.get(name, key)
        return tuple(named for named in self.names.get(key, ()) if named.approved or key[0] == tenant)

    def live(self, ref: AdapterRef) -> AdapterRecord | None:
        """Return the record of this version, None if it is not live."""
        record = self.records.get(ref.key)
        return record if record is not None and record.ref == ref else None

    def versions(self, key: Key) -> tuple[AdapterRecord, ...]:
        """Return the kept versions of a live name, the live one first; () for a name that is not live."""
        return (self.records[key], *self.previous.get(key, ())) if key in self.records else ()

    def visible_to(self, tenant: str) -> list[AdapterRecord]:
        """Return the adapters that `tenant` may use, unsorted: sorting a large pool stops other threads."""
        return [record for record in self.records.values() if record.is_visible_to(tenant)]

    def referenced(self) -> Set[str]:
        """Return the digests of all blobs that kept versions use."""
        return self.tallies.blobs.keys()

    def is_embedded(self, record: AdapterRecord, identity: str) -> bool:
        """Return whether the encoder has embedded the record, active or not."""
        pending = self.pending.get(record.ref)
        return record.encoder == identity or (pending is not None and pending.encoder == identity)

    def embedded_by(self) -> str | None:
        """Return the identity of the encoder that embedded most live adapters, None if none is embedded."""
        counts = Counter(record.encoder for record in self.records.values() if record.encoder is not None)
        return max(counts, key=lambda encoder: (counts[encoder], encoder), default=None)

    def encoders(self) -> frozenset[str]:
        """Return the identities of the active encoder and of every encoder with an embedding in this state."""
        kept = (record.encoder for key in self.records for record in self.versions(key))
        pending = (embedding.encoder for embedding in self.pending.values())
        ranked = (rank.ranking.encoder for ranks in self.rankings.values() for rank in ranks)
        active = None if self.encoder is None else self.encoder.identity
        return frozenset(identity for identity in (active, *kept, *pending, *ranked) if identity is not None)

    def folded(self) -> Iterator[Event]:
        """Yield events that lead from an empty state to this one, in the order of its records."""
        encoder = self.encoder
        yield Fold(None, None) if encoder is None else Fold(encoder.model, encoder.identity)
        for ranked in self.rankings.values():
            yield from ranked
        for kept in self.names.values():
            yield from (SetName(named) for named in reversed(kept))
        if self.visible_changes:  # after rankings and names, which count as changes
            yield from (VisibleChange(tenant, at) for tenant, at in {EVERYBODY: 0, **self.visible_changes}.items())
        for key in self.records:
            for number, record in enumerate(self.versions(key)):
                yield Keep(record, is_live=number == 0)
        yield from (Embed(ref, embedding) for ref, embedding in self.pending.items())

    def after_publishing(self, records: Iterable[AdapterRecord]) -> Snapshot:
        """Return the next generation if exactly these records were published."""
        return self.after(map(Publish, records), self.generation + 1)

    def after(self, events: Iterable[Event], generation: int) -> Snapshot:
        """Return the state after these events, as of `generation`."""
        return self.after_dated(((generation, event) for event in events), generation)

    def after_dated(self, events: Iterable[tuple[int, Event]], generation: int) -> Snapshot:
        """Return the state after these events, given with their generations, as of `generation`."""
        state = _State.of(self)
        for at, event in events:
            state.note_visibility(event, at)
            state.apply(event)
        return state.freeze(generation)


@dataclass(slots=True)
class _State:
    """Builds the next Snapshot. `public` and `tallies` are None if the previous snapshot never computed them."""

    records: MapEditor[Key, AdapterRecord]
    previous: MapEditor[Key, tuple[AdapterRecord, ...]]
    pending: MapEditor[AdapterRef, Embedding]
    encoder: ActiveEncoder | None
    visible_changes: MapEditor[str, int]
    rankings: MapEditor[str, tuple[Rank, ...]]
    names: MapEditor[Key, tuple[NamedPolicy, ...]]
    public: MapEditor[str, AdapterRecord] | None
    tallies: TalliesEditor | None
    replaced: dict[tuple[AdapterRef, int], AdapterRecord] = field(default_factory=dict)  # the records before a fold

    @classmethod
    def of(cls, snapshot: Snapshot) -> _State:
        public, tallies = snapshot.__dict__.get("public"), snapshot.__dict__.get("tallies")
        return cls(
            records=_edit(snapshot.records),
            previous=_edit(snapshot.previous),
            pending=_edit(snapshot.pending),
            encoder=snapshot.encoder,
            visible_changes=_edit(snapshot.visible_changes),
            rankings=_edit(snapshot.rankings),
            names=_edit(snapshot.names),
            public=None if public is None else _edit(public),
            tallies=None if tallies is None else tallies.edit(),
        )

    def freeze(self, generation: int) -> Snapshot:
        """Return the finished snapshot, including the updated cached properties."""
        records, previous, pending = self.records.freeze(), self.previous.freeze(), self.pending.freeze()
        shared = (self.visible_changes.freeze(), self.rankings.freeze(), self.names.freeze())
        snapshot = Snapshot(generation, records, previous, self.encoder, pending, *shared)
        if self.public is not None:
            snapshot.__dict__["public"] = self.public.freeze()
        if self.tallies is not None:
            snapshot.__dict__["tallies"] = self.tallies.freeze()
        return snapshot

    def note_visibility(self, event: Event, generation: int) -> None:
        """Record who can see the event's change. An embedding becomes visible when its encoder is activated."""
        match event:
            case Publish(AdapterRecord(ref=ref)) | Withdraw(ref) | SetVisibility(ref) | Approve(ref) | SetTrial(ref):
                live = self.records.get(ref.key)
                after = event.record.visibility if isinstance(event, Publish) else getattr(event, "visibility", None)
                is_open = after == "public" or (live is not None and _is_public(live))
                self.visible_changes[EVERYBODY if is_open else ref.tenant] = generation
            case ActivateEncoder() | Fold():  # a fold written by an earlier version has no VisibleChange rows
                self.visible_changes[EVERYBODY] = generation
            case Rank(tenant):
                self.visible_changes[tenant] = max(generation, self.visible_changes.get(tenant, 0))
            case SetName(NamedPolicy(ref=ref, approved=approved)):
                kept = self.names.get(ref.key, ())
                owner = EVERYBODY if approved or any(named.approved for named in kept) else ref.tenant
                self.visible_changes[owner] = max(generation, self.visible_changes.get(owner, 0))
            case VisibleChange(tenant, newest):
                self.visible_changes[tenant] = newest

    def apply(self, event: Event) -> None:
        """Change the state as the event says."""
        match event:
            case Publish(record) if record.is_offered:
                self._offer(record)
            case Publish(record):
                self._publish(record)
            case Withdraw(ref):
                self._withdraw(ref.key)
            case SetVisibility(ref, visibility):
                self._set_visibility(ref.key, visibility)
            case Approve(ref):
                self._change(ref, approved=True)
            case SetTrial(ref, trial):
                self._change(ref, trial=trial)
            case Embed(ref, embedding):
                if self._is_live(ref):
                    self.pending[ref] = embedding
            case ActivateEncoder(model, identity):
                self._activate(ActiveEncoder(model, identity))
            case Rank(tenant) as rank:
                self.rankings[tenant] = (rank,) if rank.is_first else (*self.rankings.get(tenant, ()), rank)
            case SetName(named):
                self._set_name(named)
            case Fold(model, identity):
                self._reset(None if model is None or identity is None else ActiveEncoder(model, identity))
            case Keep(record, is_live):
                self._restore(record, is_live=is_live)

    def _publish(self, record: AdapterRecord) -> None:
        key = record.ref.key
        older = self._versions(key)
        others = [replace(old, trial=None) for old in older if old.ref != record.ref]
        kept = [old for old in others if not old.is_offered][: KEPT_VERSIONS - 1]
        oldest = kept[-1].generation if len(kept) == KEPT_VERSIONS - 1 else 0
        kept += [old for old in others if old.is_offered and old.generation >= oldest]  # until three are newer
        if record.visibility == "private":
            kept = [replace(old, visibility="private") for old in kept]
        was_approved = any(old.ref == record.ref and old.approved for old in older)
        self._keep(key, (replace(record, approved=True) if was_approved else record, *kept))
        for old in older:
            if old.ref != record.ref:
                self.pending.pop(old.ref)

    def _offer(self, record: AdapterRecord) -> None:
        """Start a trial of a version, and keep it beside those that were live.

        It replaces a version of an earlier trial that never became live. A version that was live is kept already, in
        its place, and replaces none.
        """
        key = record.ref.key
        if key in self.records:
            live, *older = self._versions(key)
            were_live = [old for old in older if not old.is_offered]
            is_kept = any(old.ref == record.ref for old in were_live)
            kept = older if is_kept else [*were_live, replace(record, trial=None)]
            self._keep(key, (replace(live, trial=record.trial), *kept))

    def _change(self, ref: AdapterRef, **changes: Any) -> None:
        """Change the record of this version, if it is live."""
        if self._is_live(ref):
            live, *older = self._versions(ref.key)
            self._keep(ref.key, (replace(live, **changes), *older))

    def _withdraw(self, key: Key) -> None:
        record = self.records.get(key)
        if record is not None:
            self._keep(key, ())
            self.pending.pop(record.ref)

    def _set_visibility(self, key: Key, visibility: Visibility) -> None:
        if key not in self.records:
            return
        live, *older = self._versions(key)
        if visibility == "private":
            older = [replace(old, visibility=visibility) for old in older]
        self._keep(key, (replace(live, visibility=visibility), *older))

    def _set_name(self, named: NamedPolicy) -> None:
        """Make it the newest version of its name, or end the name. An approval of a kept version leaves its place."""
        key = named.ref.key
        kept = self.names.get(key, ())
        if not named.policy:
            self.names.pop(key)
            return
        place = next((place for place, old in enumerate(kept) if old.ref == named.ref), 0)
        if place and named.approved and not kept[place].approved:
            self.names[key] = (*kept[:place], named, *kept[place + 1 :])
        else:
            others = tuple(old for old in kept if old.ref != named.ref)
            self.names[key] = (named, *others)[:KEPT_POLICIES]

    def _activate(self, encoder: ActiveEncoder) -> None:
        for ref, embedding in list(self.pending.items()):
            if embedding.encoder == encoder.identity:
                self._change(ref, embedding=embedding)
        self.encoder, self.pending = encoder, PersistentMap[AdapterRef, Embedding]().edit()

    def _reset(self, encoder: ActiveEncoder | None) -> None:
        versions = [record for key in self.records for record in self._versions(key)]
        self.replaced = {(record.ref, record.generation): record for record in versions}
        self.records = PersistentMap[Key, AdapterRecord]().edit()
        self.previous = PersistentMap[Key, tuple[AdapterRecord, ...]]().edit()
        self.pending = PersistentMap[AdapterRef, Embedding]().edit()
        self.rankings = PersistentMap[str, tuple[Rank, ...]]().edit()
        self.names = PersistentMap[Key, tuple[NamedPolicy, ...]]().edit()
        self.encoder, self.public, self.tallies = encoder, None, None

    def _restore(self, record: AdapterRecord, *, is_live: bool) -> None:
        """Restore a version from a fold. Reuse the existing object if it is equal, so that no index has to change."""
        known = self.replaced.get((record.ref, record.generation))
        record = known if known is not None and known == record else record
        key = record.ref.key
        if is_live:
            self.records[key] = record
        elif record.ref not in {old.ref for old in self.previous.get(key, ())}:  # two folds of one generation have it
            self.previous[key] = (*self.previous.get(key, ()), record)

    def _keep(self, key: Key, versions: tuple[AdapterRecord, ...]) -> None:
        """Set the kept versions of a name, the live one first; () withdraws the name."""
        before = self._versions(key)
        if self.tallies is not None:
            self.tallies.replace(before, versions)
        if self.public is not None:
            if versions and _is_public(versions[0]):
                self.public[key[1]] = versions[0]
            elif before and _is_public(before[0]):
                self.public.pop(key[1])
        if versions:
            self.records[key] = versions[0]
        else:
            self.records.pop(key)
        if len(versions) > 1:
            self.previous[key] = versions[1:]
        elif len(before) > 1:
            self.previous.pop(key)

    def _versions(self, key: Key) -> tuple[AdapterRecord, ...]:
        record = self.records.get(key)
        return () if record is None else (record, *self.previous.get(key, ()))

    def _is_live(self, ref: AdapterRef) -> bool:
        record = self.records.get(ref.key)
        return record is not None and record.ref == ref


def _edit(mapping: Mapping[K, V]) -> MapEditor[K, V]:
    assert isinstance(mapping, PersistentMap)  # ensured by __post_init__
    return mapping.edit()


def _is_public(record: AdapterRecord) -> bool:
    return record.visibility == "public"
