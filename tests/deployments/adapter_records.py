"""Adapters: records for the routes' fakes, and folders with random weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from lora_store import AdapterRecord, AdapterRef, Embedding, Key, ModuleWeights, Sample, Visibility, write_peft_folder

T = TypeVar("T")
BASE = "tiny-base"
ENCODER = "fake-encoder"
MODULE = "model.layers.0.mlp.up_proj"


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


def write_random_folder(
    path: Path, seed: int, texts: Sequence[str], *, base_model: str = BASE, shape: tuple[int, int] = (8, 6)
) -> Path:
    """Write an adapter of rank 2 for one layer of this shape, with these samples."""
    num_out, num_in = shape
    random = torch.Generator().manual_seed(seed)
    sides = torch.randn(2, num_in, generator=random), torch.randn(num_out, 2, generator=random)
    samples = [Sample(text) for text in texts]
    write_peft_folder(path, {MODULE: ModuleWeights(*sides, 2.0)}, base_model=base_model, samples=samples)
    return path
