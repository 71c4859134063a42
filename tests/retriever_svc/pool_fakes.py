"""Records without a catalogue, and an encoder whose vectors a test chooses."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import numpy as np

from lora_store.adapter import LOCAL_TENANT, AdapterRef
from lora_store.catalogue import Snapshot
from lora_store.records import AdapterRecord, Visibility
from retriever_svc import Route

FAKE_IDENTITY = "fake-encoder"


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def record_of(
    name: str,
    embedding: Sequence[float] | np.ndarray | None,
    *,
    tenant: str = LOCAL_TENANT,
    visibility: Visibility = "public",
    encoder: str | None = FAKE_IDENTITY,
    template: str | None = None,
    weights: str | None = None,
) -> AdapterRecord:
    """A record as the catalogue would hold it; `weights` names its weights, which are its own by default."""
    return AdapterRecord(
        ref=AdapterRef(tenant, name, digest_of(f"version {tenant}/{name}")),
        weights_digest=digest_of(f"weights {weights or f'{tenant}/{name}'}"),
        samples_digest=None,
        visibility=visibility,
        tags=(),
        base_model="tiny",
        ranks=(8,),
        target_modules=("q_proj",),
        num_bytes=1,
        num_samples=0,
        template=template,
        embedding=None if embedding is None else tuple(map(float, embedding)),
        encoder=encoder,
        probe_shift=None,
        source="test",
        actor="test",
        created_at=datetime(2024, 1, 1, tzinfo=UTC),
        generation=1,
    )


def snapshot_of(*records: AdapterRecord, generation: int = 1) -> Snapshot:
    return Snapshot(generation, {(record.ref.tenant, record.ref.name): record for record in records})


def names(route: Route) -> list[str]:
    """The names of a route's planned adapters, in order."""
    return [adapter.ref.name for adapter in route.plan.adapters]


class FakeEncoder:
    """Encodes exactly the texts of its table, and keeps every batch it was asked for."""

    identity = FAKE_IDENTITY

    def __init__(self, table: Mapping[str, Sequence[float]], dim: int = 2) -> None:
        self.dim = dim
        self.batches: list[list[str]] = []
        self._table = table

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.batches.append(list(texts))
        return np.asarray([self._table[text] for text in texts], np.float32).reshape(-1, self.dim)
