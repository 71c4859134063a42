"""The state of the pool at one generation: what all events up to it fold into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

from lora_store.adapter import AdapterRef
from lora_store.errors import AdapterNotFound
from lora_store.events import ActivateEncoder, Approve, Embed, Event, Publish, SetVisibility, Withdraw
from lora_store.records import AdapterRecord, Embedding, Visibility

Key = tuple[str, str]  # (tenant, name)
KEPT_VERSIONS = 3  # of a live name, the live one included: what `name@digest`, replay and rollback can reach


@dataclass(frozen=True, slots=True)
class ActiveEncoder:
    """The encoder a reindex chose: what to load it from, and the identity its embeddings carry."""

    model: str
    identity: str


@dataclass(frozen=True)
class Snapshot:
    """Every live adapter by (tenant, name), as of one generation. Never changes.

    `previous`: the older versions kept of a live name, newest first; a name with none has no entry. `encoder` is None
    until a reindex activated one. `pending`: embeddings by an encoder that is not active yet.
    """

    generation: int
    records: Mapping[Key, AdapterRecord]
    previous: Mapping[Key, tuple[AdapterRecord, ...]] = field(default_factory=dict)
    encoder: ActiveEncoder | None = None
    pending: Mapping[AdapterRef, Embedding] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("records", "previous", "pending"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __reduce__(self) -> tuple[type[Snapshot], tuple[object, ...]]:
        plain = (dict(self.records), dict(self.previous), self.encoder, dict(self.pending))
        return Snapshot, (self.generation, *plain)  # a mapping proxy cannot be pickled

    @cached_property
    def public(self) -> Mapping[str, AdapterRecord]:
        """The public adapters by bare name: a bare name has one owner."""
        return {record.ref.name: record for record in self.records.values() if record.visibility == "public"}

    def resolve(self, tenant: str, name: str) -> AdapterRecord:
        """The adapter `tenant` means by `name`: its own, else the public one; `owner/name` means the owner's alone.

        Raises: AdapterNotFound, also for what exists but `tenant` may not see, after the same work.
        """
        owner, slash, bare = name.rpartition("/")
        found = self.records.get((owner, bare) if slash else (tenant, name))
        if found is None and not slash:
            found = self.public.get(name)
        if found is None or not found.is_visible_to(tenant):
            raise AdapterNotFound(name)
        return found

    def versions(self, key: Key) -> tuple[AdapterRecord, ...]:
        """The kept versions of a live name, the live one first; () for a name that is not live."""
        return (self.records[key], *self.previous.get(key, ())) if key in self.records else ()

    def visible_to(self, tenant: str) -> list[AdapterRecord]:
        """What `tenant` may use, sorted by owner and name."""
        return [record for _, record in sorted(self.records.items()) if record.is_visible_to(tenant)]

    def referenced(self) -> frozenset[str]:
        """The digests of every blob that a kept version needs."""
        kept = [record for records in self.previous.values() for record in records]
        return frozenset(digest for record in (*self.records.values(), *kept) for digest in record.blobs)

    def after_publishing(self, records: Iterable[AdapterRecord]) -> Snapshot:
        """The state of the next generation if `records` alone were published."""
        return self.after(map(Publish, records), self.generation + 1)

    def after(self, events: Iterable[Event], generation: int) -> Snapshot:
        """The state once `events` happened, as of `generation`."""
        state = _State(dict(self.records), dict(self.previous), self.encoder, dict(self.pending))
        for event in events:
            state.apply(event)
        return Snapshot(generation, state.records, state.previous, state.encoder, state.pending)


@dataclass(slots=True)
class _State:
    records: dict[Key, AdapterRecord]
    previous: dict[Key, tuple[AdapterRecord, ...]]
    encoder: ActiveEncoder | None
    pending: dict[AdapterRef, Embedding]

    def apply(self, event: Event) -> None:
        match event:
            case Publish(record):
                self._publish(record)
            case Withdraw(ref):
                self._withdraw((ref.tenant, ref.name))
            case SetVisibility(ref, visibility):
                self._set_visibility((ref.tenant, ref.name), visibility)
            case Approve(ref):
                self._approve(ref)
            case Embed(ref, embedding):
                if self._is_live(ref):
                    self.pending[ref] = embedding
            case ActivateEncoder(model, identity):
                self._activate(ActiveEncoder(model, identity))

    def _publish(self, record: AdapterRecord) -> None:
        key = (record.ref.tenant, record.ref.name)
        older = (self.records[key], *self.previous.get(key, ())) if key in self.records else ()
        kept = tuple(old for old in older if old.ref != record.ref)[: KEPT_VERSIONS - 1]
        if kept:
            self.previous[key] = kept
        was_approved = any(old.ref == record.ref and old.approved for old in older)
        self.records[key] = replace(record, approved=True) if was_approved else record
        for old in older:
            if old.ref != record.ref:
                self.pending.pop(old.ref, None)

    def _withdraw(self, key: Key) -> None:
        record = self.records.pop(key, None)
        self.previous.pop(key, None)
        if record is not None:
            self.pending.pop(record.ref, None)

    def _set_visibility(self, key: Key, visibility: Visibility) -> None:
        if key not in self.records:
            return
        self.records[key] = replace(self.records[key], visibility=visibility)
        if visibility == "private" and key in self.previous:
            self.previous[key] = tuple(replace(old, visibility=visibility) for old in self.previous[key])

    def _approve(self, ref: AdapterRef) -> None:
        if self._is_live(ref):
            key = (ref.tenant, ref.name)
            self.records[key] = replace(self.records[key], approved=True)

    def _activate(self, encoder: ActiveEncoder) -> None:
        for key, record in self.records.items():
            embedding = self.pending.get(record.ref)
            if embedding is not None and embedding.encoder == encoder.identity:
                self.records[key] = replace(record, embedding=embedding)
        self.encoder, self.pending = encoder, {}

    def _is_live(self, ref: AdapterRef) -> bool:
        record = self.records.get((ref.tenant, ref.name))
        return record is not None and record.ref == ref
