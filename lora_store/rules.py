"""What a writer may add to the catalogue: each rule gives the events that a wish means on one snapshot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Literal

from lora_store.adapter import AdapterRef
from lora_store.errors import AdapterNotFound, AdapterRefused, EncoderIncomplete
from lora_store.events import ActivateEncoder, Embed, Event, Publish, Withdraw
from lora_store.records import AdapterRecord, Embedding
from lora_store.snapshot import ActiveEncoder, Key, Snapshot

Standing = Literal["any", "live", "kept"]
"""What versions must be to be published: anything; live still, or they are left out; kept, or it is an error."""


def publish_events(snapshot: Snapshot, records: Sequence[AdapterRecord], standing: Standing = "any") -> list[Event]:
    """Publish events for what is not live yet, each record checked against those before it too.

    Raises: AdapterRefused when a public name belongs to another tenant; AdapterNotFound for what should be kept.
    """
    if standing == "live":
        records = [record for record in records if _kept(snapshot, record)[:1] == [record.ref]]
    for record in records if standing == "kept" else ():
        if record.ref not in _kept(snapshot, record):
            raise AdapterNotFound(f"{record.ref.name}@{record.ref.digest[:12]}")
    live: dict[Key, AdapterRecord] = {}
    owners: dict[str, str] = {}
    events: list[Event] = []
    for record in records:
        key, name = (record.ref.tenant, record.ref.name), record.ref.name
        if record.visibility == "public":
            public = snapshot.public.get(name, record)
            if owners.setdefault(name, public.ref.tenant) != record.ref.tenant:
                raise AdapterRefused(name, [f"the public name {name!r} belongs to another tenant"])
        current = live.get(key, snapshot.records.get(key))
        if current is None or _essence(current) != _essence(record):
            live[key] = record
            events.append(Publish(record))
    return events


def _kept(snapshot: Snapshot, record: AdapterRecord) -> list[AdapterRef]:
    """The kept versions of the record's name, the live one first."""
    return [version.ref for version in snapshot.versions((record.ref.tenant, record.ref.name))]


def withdraw_events(snapshot: Snapshot, keys: Iterable[Key], actor: str, at: datetime) -> list[Event]:
    """One event per name. Raises: AdapterNotFound for the first name that is not live."""
    events: list[Event] = []
    for key in dict.fromkeys(keys):
        if key not in snapshot.records:
            raise AdapterNotFound(key[1])
        events.append(Withdraw(snapshot.records[key].ref, actor, at))
    return events


def embed_events(snapshot: Snapshot, embeddings: Mapping[AdapterRef, Embedding]) -> list[Event]:
    """Embed events for what is live and not embedded by that encoder yet."""
    return [
        Embed(ref, embedding)
        for ref, embedding in embeddings.items()
        if (record := snapshot.records.get((ref.tenant, ref.name))) is not None
        and record.ref == ref
        and not _is_embedded(snapshot, record, embedding.encoder)
    ]


def activate_events(snapshot: Snapshot, encoder: ActiveEncoder, actor: str, at: datetime) -> list[Event]:
    """The one event, unless the encoder is active already.

    Raises: EncoderIncomplete when an adapter with samples has no embedding by it.
    """
    if snapshot.encoder == encoder:
        return []
    missing = [
        record.ref
        for record in snapshot.records.values()
        if record.num_samples and not _is_embedded(snapshot, record, encoder.identity)
    ]
    if missing:
        raise EncoderIncomplete(missing)
    return [ActivateEncoder(encoder.model, encoder.identity, actor, at)]


def _is_embedded(snapshot: Snapshot, record: AdapterRecord, identity: str) -> bool:
    pending = snapshot.pending.get(record.ref)
    return record.encoder == identity or (pending is not None and pending.encoder == identity)


def _essence(record: AdapterRecord) -> tuple[str, str, str | None]:
    return record.ref.digest, record.visibility, record.encoder
