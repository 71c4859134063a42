from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest

from lora_store.adapter import AdapterRef, Sample
from lora_store.errors import AdapterNotFound, BlobCorrupted, LoraStoreError, StoreUnavailable
from lora_store.events import ActivateEncoder, Embed
from lora_store.files import Files
from lora_store.location import Location
from lora_store.records import AdapterRecord, Embedding
from lora_store.snapshot import Snapshot
from retriever_svc import LivePool, ProjectionFiles, Retriever, Route, RouteRequest, fit_whitening
from retriever_svc.errors import ProjectionUnusable
from retriever_svc.ordinary_prompts import ordinary_prompts
from retriever_svc.reindex import MAX_FITTED, ReindexStep, refit, reindex
from tests.retriever_svc.pool_fakes import FakeEncoder, Source, embedding_of, names, record_of, snapshot_of
from tests.retriever_svc.projectable import Projectable
from tests.retriever_svc.test_whitening import DIM, world

NEW = FakeEncoder({f"text of a{n}": (math.cos(n), math.sin(n), 0.0) for n in range(100)}, dim=3, identity="new")


def pool(count: int) -> list[AdapterRecord]:
    return [record_of(f"a{n}", (1.0, 0.0), num_samples=1) for n in range(count)]


def samples(record: AdapterRecord) -> Sequence[Sample]:
    return [Sample(f"text of {record.ref.name}")]


def embeddings_of(steps: list[ReindexStep]) -> dict[AdapterRef, Embedding]:
    return {ref: embedding for step in steps for ref, embedding in step.embeddings.items()}


def test_every_adapter_with_samples_is_embedded_once_step_by_step() -> None:
    records = pool(70)
    steps = list(reindex(snapshot_of(*records, record_of("bare", None)), NEW, samples))
    assert [(step.num_done, step.num_total, len(step.embeddings)) for step in steps] == [
        (32, 70, 32),
        (64, 70, 32),
        (70, 70, 6),
    ]
    found = embeddings_of(steps)
    assert found.keys() == {record.ref for record in records}
    assert {embedding.encoder for embedding in found.values()} == {"new"}
    np.testing.assert_allclose(found[records[2].ref].vector, [math.cos(2), math.sin(2), 0], atol=1e-6)


def test_existing_embeddings_are_not_computed_again() -> None:
    records = pool(4)
    pending = {
        records[0].ref: embedding_of((1, 0, 0), encoder="new"),
        records[1].ref: embedding_of((1, 0), encoder="x"),
    }
    [step] = reindex(snapshot_of(*records, pending=pending), NEW, samples)
    assert step.embeddings.keys() == {record.ref for record in records[1:]}
    renewed = record_of("a3", (1.0, 0.0, 0.0), encoder="new", num_samples=1)
    [step] = reindex(snapshot_of(*records[:3], renewed, pending=pending), NEW, samples)
    assert step.embeddings.keys() == {record.ref for record in records[1:3]}
    assert list(reindex(snapshot_of(renewed), NEW, samples)) == []


@pytest.mark.parametrize("error", [AdapterNotFound("x"), BlobCorrupted("x", "y")], ids=repr)
def test_unreadable_adapters_are_named_and_the_others_continue(
    error: LoraStoreError, caplog: pytest.LogCaptureFixture
) -> None:
    def source(record: AdapterRecord) -> Sequence[Sample]:
        if record.ref.name == "a1":
            raise error
        return samples(record)

    records = pool(3)
    [step] = reindex(snapshot_of(*records), NEW, source)
    assert step.unreadable == (records[1].ref,)
    assert records[1].ref.digest in caplog.text and str(error) in caplog.text
    assert step.embeddings.keys() == {records[0].ref, records[2].ref}


def test_adapters_without_a_finite_vector_are_named_and_the_others_continue(caplog: pytest.LogCaptureFixture) -> None:
    records = pool(3)
    table = {"text of a0": (1.0, 0.0, 0.0), "text of a1": (math.nan, 0.0, 0.0), "text of a2": (0.0, 1.0, 0.0)}
    [step] = reindex(snapshot_of(*records), FakeEncoder(table, dim=3, identity="new"), samples)
    assert step.unreadable == (records[1].ref,)
    assert f"no finite vector for the samples of version {records[1].ref.digest}" in caplog.text
    assert step.embeddings.keys() == {records[0].ref, records[2].ref}


def test_an_unavailable_store_stops_it_and_committed_embeddings_stay() -> None:
    records, snapshot = pool(40), snapshot_of(*pool(40))

    def source(record: AdapterRecord) -> Sequence[Sample]:
        if record.ref.name == "a35":
            raise StoreUnavailable("down")
        return samples(record)

    steps = reindex(snapshot, NEW, source)
    first = next(steps)
    with pytest.raises(StoreUnavailable):
        next(steps)
    snapshot = snapshot.after([Embed(ref, embedding) for ref, embedding in first.embeddings.items()], 2)
    [rest] = reindex(snapshot, NEW, samples)
    assert rest.embeddings.keys() == {record.ref for record in records} - first.embeddings.keys()


def test_a_reindexed_pool_swaps_encoder_and_index_at_one_generation() -> None:
    old = FakeEncoder({"text of a1": (1.0, 0.0)})
    source = Source(*pool(3))
    pools = LivePool(lambda model: NEW if model == "new-model" else old, source)
    retriever = Retriever(pools)

    def commit(snapshot: Snapshot) -> None:
        source.now = snapshot
        pools.catch_up(snapshot.generation)

    for step in retriever.reindex("new-model", samples):
        events = [Embed(ref, embedding) for ref, embedding in step.embeddings.items()]
        commit(source.now.after(events, source.now.generation + 1))
        assert pools.stats().encoder == old.identity
    late = record_of("late", (1.0, 0.0), num_samples=1)
    commit(Snapshot(3, {**source.now.records, ("local", "late"): late}, pending=source.now.pending))
    commit(source.now.after([Embed(late.ref, embedding_of((0, 0, 1), encoder="new"))], 4))
    commit(source.now.after([ActivateEncoder("new-model", "new", "me", late.created_at)], 5))
    [route] = retriever.route([RouteRequest("text of a2")])
    assert isinstance(route, Route)
    assert names(route)[0] == "a2"
    assert (route.generation, pools.stats().encoder, pools.stats().num_live) == (5, "new", 4)


def test_a_refit_of_a_large_pool_reads_a_part_that_is_spread_over_it() -> None:
    rng = np.random.default_rng(0)
    read: list[int] = []

    class Any(FakeEncoder):
        def encode_plain(self, texts: Sequence[str], owners: Sequence[str] | None = None) -> np.ndarray:
            self.batches.append(list(texts))
            return rng.standard_normal((len(texts), DIM)).astype(np.float32)

    def source(record: AdapterRecord) -> Sequence[Sample]:
        read.append(int(record.ref.name[1:]))
        return [Sample(f"{n} of {record.ref.name}") for n in range(40)]

    for num_adapters, num_read, num_texts in ((3 * MAX_FITTED, MAX_FITTED, 8), (100, 100, 32)):
        encoder, read[:] = Any({}, dim=DIM, identity="plain"), []
        refit(snapshot_of(*pool(num_adapters)), encoder, source, None)
        assert (len(read), len(set(read))) == (num_read, num_read)
        assert max(np.diff(sorted(read))) <= num_adapters // num_read
        assert sum(map(len, encoder.batches)) == num_read * num_texts


def test_a_refit_reads_the_pools_samples_and_its_projection_is_prepared_from_the_store(tmp_path: Path) -> None:
    groups = world(num_tasks=12)
    table = {f"sample {n} of a{task}": row.tolist() for task, rows in enumerate(groups) for n, row in enumerate(rows)}
    table |= {text: row.tolist() for text, row in zip(ordinary_prompts(), cycle(groups[0]), strict=False)}

    def source(record: AdapterRecord) -> Sequence[Sample]:
        return [Sample(text) for text in table if text.endswith(f" of {record.ref.name}")]

    files = ProjectionFiles(Files(Location(str(tmp_path)).child("projections")))
    records = [record_of(f"a{n}", groups[n][0], num_samples=20, encoder="plain") for n in range(12)]
    pools = LivePool(lambda model: Projectable(table, DIM, "plain"), Source(*records), projections=files)
    fitted = pools.refit("model", source)
    texts = [[sample.input for sample in source(record)] for record in records]
    assert fitted.identity == fit_whitening("plain", groups, texts).identity
    [step] = Retriever(pools).reindex("model", source, fitted.identity)
    assert {e.encoder for e in step.embeddings.values()} == {fitted.identity}
    for task, record in enumerate(records):
        expected = fitted.own_scores(groups[task], texts[task])
        np.testing.assert_allclose(step.embeddings[record.ref].own_scores, expected, atol=1e-5)
    with pytest.raises(ProjectionUnusable, match="no place"):
        LivePool(lambda model: NEW, Source()).refit("model", source)
