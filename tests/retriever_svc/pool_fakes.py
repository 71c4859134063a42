"""Records without a catalogue, an encoder with chosen vectors, and a pool with delayed background work."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from lora_store.adapter import LOCAL_TENANT, AdapterRef
from lora_store.records import AdapterRecord, Embedding, Visibility
from lora_store.snapshot import Snapshot
from retriever_svc import Encoder, LivePool, ProjectionFiles, Route
from retriever_svc.vector_cache import OwnedText

FAKE_IDENTITY = "fake-encoder"
BASE = "tiny"


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def record_of(
    name: str,
    embedding: Sequence[float] | np.ndarray | None,
    *,
    tenant: str = LOCAL_TENANT,
    visibility: Visibility = "public",
    encoder: str = FAKE_IDENTITY,
    template: str | None = None,
    weights: str | None = None,
    tags: tuple[str, ...] = (),
    own_scores: Sequence[float] = (),
    version: str = "",
    num_samples: int = 0,
    approved: bool = False,
    base_model: str = BASE,
) -> AdapterRecord:
    """Return a record as in the catalogue. `weights` sets its weights' digest, by default a unique one."""
    return AdapterRecord(
        ref=AdapterRef(tenant, name, digest_of(f"version{version} {tenant}/{name}")),
        weights_digest=digest_of(f"weights{version} {weights or f'{tenant}/{name}'}"),
        samples_digest=digest_of(f"samples {name}") if num_samples else None,
        visibility=visibility,
        tags=tags,
        base_model=base_model,
        ranks=(8,),
        target_modules=("q_proj",),
        num_bytes=1,
        num_samples=num_samples,
        template=template,
        embedding=None if embedding is None else embedding_of(embedding, own_scores, encoder),
        probe_shift=None,
        source="test",
        actor="test",
        created_at=datetime(2024, 1, 1, tzinfo=UTC),
        generation=1,
        approved=approved,
    )


def embedding_of(
    vector: Sequence[float] | np.ndarray, own_scores: Sequence[float] = (), encoder: str = FAKE_IDENTITY
) -> Embedding:
    return Embedding(encoder, np.asarray(vector, np.float32), np.asarray(own_scores, np.float32))


def snapshot_of(*records: AdapterRecord, generation: int = 1, **fields: Any) -> Snapshot:
    return Snapshot(generation, {(record.ref.tenant, record.ref.name): record for record in records}, **fields)


def names(route: Route) -> list[str]:
    """Return the names of a route's planned adapters, in order."""
    return [adapter.ref.name for adapter in route.plan.adapters]


class FakeEncoder:
    """Encodes exactly the texts of its table, and records every batch."""

    def __init__(self, table: Mapping[str, Sequence[float]], dim: int = 2, identity: str = FAKE_IDENTITY) -> None:
        self.dim, self.identity, self.projection = dim, identity, None
        self.batches: list[list[str]] = []
        self.owned: list[OwnedText] = []
        self._table = table

    def encode(self, texts: Sequence[str], owners: Sequence[str] | None = None) -> np.ndarray:
        return self.encode_plain(texts, owners)

    def encode_plain(self, texts: Sequence[str], owners: Sequence[str] | None = None) -> np.ndarray:
        self.batches.append(list(texts))
        self.owned += zip(owners or (), texts, strict=False)
        return np.asarray([self._table[text] for text in texts], np.float32).reshape(-1, self.dim)


class Source:
    """A catalogue that returns the snapshot set by the test."""

    def __init__(self, *records: AdapterRecord) -> None:
        self.now = snapshot_of(*records)

    def __call__(self) -> Snapshot:
        return self.now

    def commit(self, *records: AdapterRecord, **fields: Any) -> Snapshot:
        """Set the next generation to exactly these `records`."""
        self.now = snapshot_of(*records, generation=self.now.generation + 1, **fields)
        return self.now


class Later:
    """Background work that runs when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def __call__(self, work: Callable[[], None]) -> None:
        self.waiting.append(work)

    def run(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()


class OrdinaryRows(ProjectionFiles):
    """No projections, and chosen vectors for the ordinary prompts of any encoder: (J, D)."""

    def __init__(self, rows: Sequence[Sequence[float]] | np.ndarray) -> None:
        super().__init__()
        self._rows = np.asarray(rows, np.float32)

    def ordinary(self, encoder: Encoder) -> np.ndarray:
        return self._rows

    def centre(self, encoder: Encoder) -> None:
        return None


def live_pool(encoder: FakeEncoder, source: Callable[[], Snapshot], **options: Any) -> LivePool:
    return LivePool(lambda model: encoder, source, **options)
