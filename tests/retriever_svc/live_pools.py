"""Adapters in a live pool, and the results of a search over them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lora_store.files import Files
from lora_store.location import Location
from lora_store.records import AdapterRecord
from retriever_svc import IndexSettings, LivePool, SavedIndexes
from retriever_svc.encoder import unit_rows
from tests.retriever_svc.pool_fakes import FakeEncoder, record_of

DIM = 8
TINY = IndexSettings(exact_rows=40, side_rows=10, num_probes=1000)
ENCODER = FakeEncoder({}, dim=DIM)


def records_of(count: int, prefix: str = "a", seed: int = 0, encoder: str = ENCODER.identity) -> list[AdapterRecord]:
    vectors = unit_rows(np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32))
    return [record_of(f"{prefix}{n}", vector, encoder=encoder) for n, vector in enumerate(vectors)]


def names_found(pools: LivePool, like: AdapterRecord, top_k: int = 3) -> list[str]:
    assert like.embedding is not None
    [matches] = pools.current.nearest(like.embedding.vector[np.newaxis], top_k, "local")
    return [match.record.ref.name for match in matches]


def assert_finds_exactly(pools: LivePool, records: list[AdapterRecord]) -> None:
    index = pools.current.index
    assert {record.ref for record in index.records} == {record.ref for record in records}
    for record in records[:: max(1, len(records) // 10)]:
        assert names_found(pools, record, 1) == [record.ref.name]


def saved_in(folder: Path) -> SavedIndexes:
    return SavedIndexes(Files(Location(str(folder)).child("index")))
