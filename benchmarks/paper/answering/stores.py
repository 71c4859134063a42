"""The pool in a store, as after a publish, and the server's Retriever over it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.training.adapter_files import BASE_NAME
from gpu_worker.bank.bank import LoraBank
from lora_store import AdapterWeights, LoraStore, decode_weights
from retriever_svc import Encoder, LivePool, Retriever, embed_groups

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
    return Retriever(LivePool(lambda _: encoder, store.snapshot))
