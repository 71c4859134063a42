"""The samples that explain a choice: the nearest ones of the tenant's own adapters, and of no other's."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pytest

from lora_store.adapter import Sample
from lora_store.errors import BlobCorrupted, StoreUnavailable
from lora_store.plan import Plan
from lora_store.records import AdapterRecord
from retriever_svc import Candidate, IndexSettings, Route
from retriever_svc.encoder import unit_rows
from retriever_svc.nearest_samples import MAX_ADAPTERS, MAX_CHARS, MAX_SAMPLES, NUM_SHOWN, NearestSamples
from retriever_svc.pool import Pool
from tests.retriever_svc.pool_fakes import FakeEncoder, record_of, snapshot_of

DIM = 6
EAST = np.eye(1, DIM, dtype=np.float32)[0]
Texts = dict[str, list[str]]  # of each adapter's samples


def texts_of(names: Sequence[str], count: int = 5) -> Texts:
    return {name: [f"{name} {number}" for number in range(count)] for name in names}


def table_of(texts: Texts) -> dict[str, np.ndarray]:
    every = [text for own in texts.values() for text in own]
    rows = unit_rows(np.random.default_rng(0).standard_normal((len(every), DIM)).astype(np.float32))
    return dict(zip(every, rows, strict=True))


def route_of(*records: AdapterRecord, scores: Sequence[float] | None = None) -> Route:
    pairs = zip(records, scores or [0.5] * len(records), strict=True)
    return Route(Plan("base"), tuple(Candidate(record.ref, score) for record, score in pairs), 1, abstained=True)


def shown(
    records: Sequence[AdapterRecord],
    texts: Texts,
    *routes: Route,
    tenant: str = "local",
    failing: dict[str, Exception] | None = None,
) -> list[Route]:
    """Explain the routes of prompts in the direction EAST."""

    def source(record: AdapterRecord) -> list[Sample]:
        if record.ref.name in (failing or {}):
            raise (failing or {})[record.ref.name]
        return [Sample(text) for text in texts[record.ref.name]]

    encoder = FakeEncoder(table_of(texts), dim=DIM)
    pool = Pool.of(snapshot_of(*records), encoder, IndexSettings())
    nearest = NearestSamples.of(pool, tenant, routes, source)
    nearest.encoding.encode_all()
    return nearest.shown_in(routes, [EAST] * len(routes))


def test_a_candidate_shows_its_nearest_samples_best_first() -> None:
    records = [record_of(name, EAST) for name in ("a", "b")]
    texts = texts_of(["a", "b"])
    [explained] = shown(records, texts, route_of(*records))
    table = table_of(texts)
    for candidate in explained.candidates:
        scored = [(float(table[text] @ EAST), text) for text in texts[candidate.ref.name]]  # slow, one by one
        expected = sorted(scored, reverse=True)[:NUM_SHOWN]
        assert [text for _, text in expected] == [sample.text for sample in candidate.samples]
        assert [score for score, _ in expected] == pytest.approx([sample.score for sample in candidate.samples])
    assert explained.plan == route_of(*records).plan
    assert [c.ref for c in explained.candidates] == [record.ref for record in records]
    older = record_of("a", EAST, version="0")
    [explained] = shown(records, texts, route_of(older))
    assert explained.candidates[0].samples == (), "no samples of the live version"
    assert shown([], {}, route_of()) == [route_of()]


@pytest.mark.parametrize("visibility", ["public", "private"])
def test_samples_of_another_tenant_are_neither_read_nor_shown(visibility: str) -> None:
    mine = record_of("mine", EAST, tenant="acme")
    theirs = record_of("theirs", EAST, tenant="globex", visibility=visibility, approved=True)
    texts = texts_of(["mine"])  # a read of the other's fails
    [explained] = shown([mine, theirs], texts, route_of(theirs, mine), tenant="acme")
    assert [len(candidate.samples) for candidate in explained.candidates] == [0, NUM_SHOWN]


def test_the_adapters_that_are_read_are_bounded_and_the_best_of_each_route_come_first() -> None:
    records = [record_of(f"a{number:02}", EAST) for number in range(3 * MAX_ADAPTERS)]
    half = len(records) // 2
    scores = list(np.linspace(0.1, 0.9, half))  # the last fits best
    first, second = shown(
        records,
        texts_of([record.ref.name for record in records]),
        route_of(*records[:half], scores=scores),
        route_of(*records[half:], scores=scores),
    )
    for route in (first, second):
        named = [place for place, candidate in enumerate(route.candidates) if candidate.samples]
        assert named == list(range(half - MAX_ADAPTERS // 2, half))


def test_samples_and_their_length_are_bounded() -> None:
    long = "x" * (MAX_CHARS + 1)
    texts = {"a": [long, "y" * MAX_CHARS], "b": [f"{number}" for number in range(MAX_SAMPLES + 50)]}
    records = [record_of(name, EAST) for name in texts]
    encoded = NearestSamples.of(
        Pool.of(snapshot_of(*records), FakeEncoder({}, dim=DIM), IndexSettings()),
        "local",
        [route_of(*records)],
        lambda record: [Sample(text) for text in texts[record.ref.name]],
    )
    assert [len(own) for own in encoded.texts.values()] == [2, MAX_SAMPLES]
    [explained] = shown(records[:1], {"a": texts["a"]}, route_of(records[0]))
    lengths = {sample.text[-1]: len(sample.text) for sample in explained.candidates[0].samples}
    assert lengths == {"…": MAX_CHARS, "y": MAX_CHARS}


@pytest.mark.parametrize("error", [StoreUnavailable("endpoint stopped"), BlobCorrupted("a", "b")])
def test_samples_that_cannot_be_read_are_left_out(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    records = [record_of(name, EAST) for name in ("a", "b")]
    with caplog.at_level(logging.WARNING):
        [explained] = shown(records, texts_of(["a", "b"]), route_of(*records), failing={"a": error})
    assert [len(candidate.samples) for candidate in explained.candidates] == [0, NUM_SHOWN]
    assert caplog.records
