"""Adapter records for the routes' fakes."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import TypeVar

import numpy as np

from lora_store import AdapterRecord, AdapterRef, Embedding, Key, Visibility

T = TypeVar("T")
BASE = "tiny-base"
ENCODER = "fake-encoder"


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def adapter(
    name: str,
    *,
    version: str = "",
    template: str | None = None,
    samples: bool = True,
    generation: int = 1,
    tenant: str = "local",
    visibility: Visibility = "public",
) -> AdapterRecord:
    """Return a record as in the catalogue. Another `version` has another digest and other weights."""
    vector = np.array([1.0, 0.0], np.float32)
    return AdapterRecord(
        ref=AdapterRef(tenant, name, digest_of(f"version {name} {version}")),
        weights_digest=digest_of(f"weights {name} {version}"),
        samples_digest=digest_of(f"samples {name}") if samples else None,
        visibility=visibility,
        tags=(version,) if version else (),
        base_model=BASE,
        ranks=(2, 4),
        target_modules=("q_proj",),
        num_bytes=9,
        num_samples=2 if samples else 0,
        template=template,
        embedding=Embedding(ENCODER, vector, vector) if samples else None,
        probe_shift=0.5,
        source=name,
        actor="tester",
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        generation=generation,
    )


POOL = (adapter("poet"), adapter("coder", template="chat"))


def pool_of(*records: AdapterRecord) -> dict[Key, tuple[AdapterRecord, ...]]:
    """Return the contents of a FakeStore: records of one name are its versions, the live one first."""
    live: dict[Key, tuple[AdapterRecord, ...]] = {}
    for record in records:
        live[key_of(record)] = (*live.get(key_of(record), ()), record)
    return live


def key_of(record: AdapterRecord) -> Key:
    return record.ref.tenant, record.ref.name


def given(event: T | Exception) -> T:
    """Return a scripted value, or raise it if it is an exception."""
    if isinstance(event, Exception):
        raise event
    return event
