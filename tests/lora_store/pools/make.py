"""Make a small pool with the code of one release: `python -m tests.lora_store.pools.make FOLDER` in its checkout.

The folder must not exist. Its path is kept in its log, so make it at /tmp/pool and move it. A test opens the pools of
all releases and compares them with their `expected.json`.
"""

from __future__ import annotations

import inspect
import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from lora_store import AdapterRef, Embedding, LoraStore, ModuleWeights, Sample, Staged, write_peft_folder

BASE, LAYER = "tiny-base", "model.layers.0.self_attn.q_proj"
LATER = timedelta(days=1)


def make(uri: str) -> LoraStore:
    """Make changes of every kind that all releases have, with a fold in the middle, and of newer ones if possible."""
    reads = {"read_contract": lambda name, data: (data.decode(), ())}
    has_contracts = "contract" in inspect.signature(LoraStore.stage).parameters
    store = LoraStore(uri, accepts_base=[BASE], **(reads if has_contracts else {}))
    for seed, name in enumerate(["poet", "coder", "gone"]):
        publish(store, name, seed)
    publish(store, "poet", 10, tags=["fun"])
    store.withdraw("local", ["gone"], "maker")
    store.approve([ref_of(store, "local", "poet")], "maker")
    store._catalogue.vacuum(datetime.now(UTC) + LATER)  # folds, and deletes what the fold replaces
    publish(store, "poet", 20, tags=["fun", "new"])
    publish(store, "secret", 30, tenant="acme", visibility="private")
    store.set_visibility("local", "coder", "private", "maker")
    store.add_embeddings({record.ref: embedding(5, "next") for record in store.snapshot().records.values()})
    store.activate_encoder("model", "next", "maker")
    publish(store, "late", 40, encoder="next")
    if "share" in inspect.signature(LoraStore.stage).parameters:
        publish(store, "poet", 50, encoder="next", share=0.25)
        publish(store, "passing", 60, ttl_s=86400.0 * 36500)
    if has_contracts:
        publish(store, "late", 70, encoder="next", contract='{"stop":["END"]}')
    return store


def publish(store: LoraStore, name: str, seed: int, encoder: str = "first", **options: Any) -> Staged:
    """Publish random weights under this name."""
    random = torch.Generator().manual_seed(seed)
    weights = ModuleWeights(torch.randn(2, 6, generator=random), torch.randn(8, 2, generator=random), 1.0)
    with TemporaryDirectory() as folder:
        samples = [Sample(f"{name} {seed}"), Sample("another")]
        write_peft_folder(Path(folder, name), {LAYER: weights}, base_model=BASE, samples=samples)
        staged: Staged = store.stage(Path(folder, name), **options)
    store.commit([staged], [embedding(seed, encoder)], [0.5], "maker")
    return staged


def embedding(seed: int, encoder: str) -> Embedding:
    vector = np.array([np.cos(seed), np.sin(seed)], np.float32)
    return Embedding(encoder, vector, np.array([0.5, 0.25], np.float32))


def ref_of(store: LoraStore, tenant: str, name: str) -> AdapterRef:
    return store.snapshot().records[tenant, name].ref


def facts_of(store: LoraStore) -> dict[str, Any]:
    """Return what must be read from a pool, in JSON's types."""
    snapshot = store.snapshot()
    names = ("visibility", "approved", "tags", "base_model", "num_samples", "source", "generation", "encoder")
    adapters = {}
    for key in sorted(snapshot.records):
        versions = snapshot.versions(key)
        adapters["/".join(key)] = [
            {name: getattr(record, name) for name in names}
            | {"digest": record.ref.digest, "blobs": record.blobs, "created_at": record.created_at.isoformat()}
            | {"vector": None if record.embedding is None else record.embedding.vector.tolist()}
            | {"trial": str(getattr(record, "trial", None)), "expires_at": str(getattr(record, "expires_at", None))}
            | {"contract": getattr(record, "contract", None)}
            for record in versions
        ]
    facts: dict[str, Any] = json.loads(json.dumps({"encoder": str(snapshot.encoder), "adapters": adapters}))
    return facts


if __name__ == "__main__":
    (target,) = sys.argv[1:]
    made = make(target)
    Path(target, "expected.json").write_text(json.dumps(facts_of(made), indent=1) + "\n")
    for part in ("holds", "sweeps"):
        if Path(target, part).is_dir():
            Path(target, part).rmdir()
