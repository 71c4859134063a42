from __future__ import annotations

import math

import numpy as np
import pytest

from lora_store.records import AdapterRecord
from retriever_svc.encoder import unit_rows
from retriever_svc.index import AdapterIndex, Match
from tests.retriever_svc.pool_fakes import record_of


def random_rows(rng: np.random.Generator, count: int, dim: int = 16) -> np.ndarray:
    return unit_rows(rng.standard_normal((count, dim)).astype(np.float32))


def records_of(count: int) -> list[AdapterRecord]:
    return [record_of(f"adapter-{number * 7919 % 1000:03d}", None, tenant=f"t{number % 3}") for number in range(count)]


def slow_search(
    records: list[AdapterRecord], vectors: np.ndarray, query: np.ndarray, top_k: int, allowed: set[int]
) -> list[tuple[AdapterRecord, float]]:
    scored = []
    for position in allowed:
        row = vectors[position].astype(np.float64)
        cosine = float(row @ query) / float(np.linalg.norm(row) * np.linalg.norm(query))
        scored.append((-round(cosine, 9), records[position].ref.tenant, records[position].ref.name, position))
    return [(records[position], -score) for score, _, _, position in sorted(scored)[:top_k]]


def assert_same(found: list[Match], expected: list[tuple[AdapterRecord, float]]) -> None:
    assert [match.record.ref for match in found] == [record.ref for record, _ in expected]
    assert [match.score for match in found] == pytest.approx([score for _, score in expected], abs=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("top_k", [1, 3, 16, 1000])
def test_search_equals_a_slow_loop_over_the_allowed(top_k: int, share: float) -> None:
    rng = np.random.default_rng(top_k)
    records, vectors, queries = records_of(300), random_rows(rng, 300) * 3, random_rows(rng, 25)
    chosen = {position for position in range(300) if rng.random() < share}
    index = AdapterIndex(records, vectors)
    allowed = index.bitmap(records[position].ref for position in chosen)
    found = index.search(queries, top_k, allowed)
    assert len(found) == len(queries)
    for query, matches in zip(queries, found, strict=True):
        assert len(matches) == min(top_k, len(chosen))
        assert_same(matches, slow_search(records, vectors, query, top_k, chosen))


def test_without_a_bitmap_all_are_allowed() -> None:
    rng = np.random.default_rng(0)
    records, vectors, queries = records_of(40), random_rows(rng, 40), random_rows(rng, 3)
    index = AdapterIndex(records, vectors)
    assert index.search(queries, 5) == index.search(queries, 5, index.bitmap(record.ref for record in records))


@pytest.mark.parametrize("num_queries", [1, 50])  # FAISS multiplies otherwise from 20 queries on
@pytest.mark.parametrize("num_equal", [2, 9, 120])
def test_ties_go_by_tenant_and_name_wherever_the_cut_falls(num_equal: int, num_queries: int) -> None:
    rng = np.random.default_rng(num_equal)
    records, vectors = records_of(200), random_rows(rng, 200)
    equal = rng.choice(200, num_equal, replace=False)
    vectors[equal] = vectors[equal[0]]
    queries = np.repeat(vectors[equal[:1]], num_queries, axis=0)
    expected = sorted((records[position].ref.tenant, records[position].ref.name) for position in equal)
    for top_k in (1, 2, num_equal - 1, num_equal):
        for matches in AdapterIndex(records, vectors).search(queries, top_k):
            assert [(match.record.ref.tenant, match.record.ref.name) for match in matches] == expected[:top_k]
            assert len({match.score for match in matches}) == 1


@pytest.mark.parametrize("top_k", [4, 6, 20, 63, 70])
def test_ties_below_better_matches_go_by_name_too(top_k: int) -> None:
    rng = np.random.default_rng(top_k)
    records = [record_of(f"adapter-{number:03d}", None) for number in range(80)]
    vectors = np.repeat(random_rows(rng, 1), 80, axis=0)
    vectors[-4:] += random_rows(rng, 4) / 4  # what comes last in name order scores best
    [query] = unit_rows(vectors[-4:].mean(axis=0, keepdims=True))
    [found] = AdapterIndex(records, vectors).search(query[np.newaxis], top_k)
    assert_same(found, slow_search(records, vectors, query, top_k, set(range(80))))


def test_the_best_of_many_near_ties_are_found() -> None:
    rng = np.random.default_rng(6)
    records, queries = records_of(200), random_rows(rng, 30, 384)
    vectors = np.repeat(random_rows(rng, 1, 384), 200, axis=0) + rng.standard_normal((200, 384)) * 1e-8
    index = AdapterIndex(records, vectors.astype(np.float32))
    exact = index._vectors.astype(np.float64) @ queries.T.astype(np.float64)
    for matches, scores in zip(index.search(queries, 3), exact.T, strict=True):
        assert [match.score for match in matches] == pytest.approx(sorted(scores)[:-4:-1], abs=1e-12)


def test_scores_are_finer_than_float32_sums() -> None:
    rng = np.random.default_rng(5)
    records, vectors, [query] = records_of(50), random_rows(rng, 50, 384), random_rows(rng, 1, 384)
    index = AdapterIndex(records, vectors)
    rows = {record.ref: row for record, row in zip(records, unit_rows(vectors), strict=True)}
    for match in index.search(query[np.newaxis], 50)[0]:
        exact = math.fsum(float(a) * float(b) for a, b in zip(rows[match.record.ref], query, strict=True))
        assert match.score == pytest.approx(exact, abs=1e-12)


def test_an_answer_does_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(3)
    records, vectors, queries = records_of(500), random_rows(rng, 500, 384), random_rows(rng, 64, 384)
    index = AdapterIndex(records, vectors)
    alone = [index.search(query[np.newaxis], 8)[0] for query in queries]
    assert index.search(queries, 8) == alone


def test_vectors_of_any_length_score_by_cosine() -> None:
    records = [record_of("far", None), record_of("near", None)]
    index = AdapterIndex(records, np.asarray([[100, 100], [0.1, 0]], np.float32))
    [matches] = index.search(np.asarray([[1, 0]], np.float32), 2)
    assert [match.record.ref.name for match in matches] == ["near", "far"]
    assert [match.score for match in matches] == pytest.approx([1, np.sqrt(0.5)], abs=1e-6)


def test_nothing_to_find_is_an_empty_list() -> None:
    empty = AdapterIndex([], np.empty((0, 2), np.float32))
    queries = np.asarray([[1, 0], [0, 1]], np.float32)
    assert empty.search(queries, 3) == [[], []]
    assert empty.search(queries, 3, empty.bitmap([])) == [[], []]
    one = AdapterIndex([record_of("one", None)], np.asarray([[1, 0]], np.float32))
    assert one.search(queries, 3, one.bitmap([])) == [[], []]
    assert one.search(queries[:0], 3) == []


def test_a_bitmap_leaves_out_what_is_not_indexed() -> None:
    index = AdapterIndex([record_of("one", None)], np.asarray([[1, 0]], np.float32))
    assert index.bitmap([record_of("other", None).ref]).sum() == 0
