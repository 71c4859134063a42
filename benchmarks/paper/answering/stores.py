"""The pool in a store, as after a publish, and the server's Retriever over it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.training.adapter_files import BASE_NAME
from gpu_worker.bank.bank import LoraBank
from lora_store import AdapterWeights, LoraStore, decode_weights
from retriever_svc import Encoder, LivePool, ProjectionFiles, Retriever, embed_groups

ACTOR = "study"


def publish(store: LoraStore, folders: Sequence[Path], encoder: Encoder | None, bank: LoraBank) -> None:
    """Publish the adapters of `folders` in one commit. Without an encoder they are reachable by name only."""
    staged = [store.stage(folder, module_shapes=bank.shapes) for folder in folders]
    nothing = [None] * len(staged)
    embeddings = nothing if encoder is None else embed_groups(encoder, [item.samples for item in staged])
    store.commit(staged, embeddings, nothing, actor=ACTOR)


def open_store(uri: str) -> LoraStore:
    return LoraStore(uri, accepts_base=[BASE_NAME])


def fetch_from(store: LoraStore, digest: str) -> AdapterWeights:
    return decode_weights(digest, store.load(digest))


def retriever_over(store: LoraStore, encoder: Encoder) -> Retriever:
    """Return the server's Retriever. An encoder with a projection is used with thresholds, as in a server."""
    if encoder.projection is None:
        return Retriever(LivePool(lambda _: encoder, store.snapshot))
    return Retriever(LivePool(lambda _: encoder, store.snapshot, projections=ProjectionFiles(), projection="none"))


def packaged_encoder(num_cached_texts: int = 40_000) -> Encoder:
    """Return the packaged encoder with its projection, as a server loads it by default. It caches all texts."""
    encoder = Encoder(max_cached_texts=num_cached_texts)
    return encoder.projected(ProjectionFiles().shipped(encoder.identity))
