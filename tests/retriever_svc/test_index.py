from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lora_store.records import AdapterRecord
from lora_store.snapshot import Key
from retriever_svc import AdapterIndex, IndexSettings
from retriever_svc.encoder import unit_rows
from retriever_svc.index import Allowed, Match
from tests.retriever_svc.pool_fakes import record_of

ALL_LISTS = 10_000  # probes: all lists are read
EXACT = IndexSettings()
LISTS = IndexSettings(exact_rows=20, side_rows=30, num_probes=ALL_LISTS)


def random_rows(rng: np.random.Generator, count: int, dim: int = 16) -> np.ndarray:
    return unit_rows(rng.standard_normal((count, dim)).astype(np.float32))


def records_of(vectors: np.ndarray) -> list[AdapterRecord]:
    """Return records of three tenants, not in the order of their names."""
    return [
        record_of(f"adapter-{number * 7919 % 1000:03d}", vector, tenant=f"t{number % 3}")
        for number, vector in enumerate(vectors)
    ]


def index_of(vectors: np.ndarray, settings: IndexSettings = EXACT) -> AdapterIndex:
    index = AdapterIndex.of(records_of(vectors), vectors.shape[1], settings)
    return index.trained() if index.wants_lists else index


def exact_scores(records: Sequence[AdapterRecord], query: np.ndarray) -> list[float]:
    rows = [record.embedding.vector.astype(np.float64) for record in records if record.embedding is not None]
    return [float(row @ query) / float(np.linalg.norm(row) * np.linalg.norm(query)) for row in rows]


def slow_search(records: Iterable[AdapterRecord], query: np.ndarray, top_k: int) -> list[tuple[AdapterRecord, float]]:
    records = list(records)
    scored = [
        (-round(score, 9), record.ref.tenant, record.ref.name, record)
        for record, score in zip(records, exact_scores(records, query), strict=True)
    ]
    return [(record, -score) for score, _, _, record in sorted(scored, key=lambda row: row[:3])[:top_k]]


def assert_same(found: list[Match], expected: list[tuple[AdapterRecord, float]]) -> None:
    assert [match.record.ref for match in found] == [record.ref for record, _ in expected]
    assert [match.score for match in found] == pytest.approx([score for _, score in expected], abs=1e-6)


def may_use(record: AdapterRecord, tenant: str, tags: Iterable[str]) -> bool:
    return record.is_visible_to(tenant) and set(tags) <= set(record.tags)


def labelled(rng: np.random.Generator, name: str, dim: int = 16) -> AdapterRecord:
    """Return records with skewed owners and tags: most belong to one tenant, few have a rare tag."""
    tenant = "big" if rng.random() < 0.8 else f"t{rng.integers(0, 5)}"
    tags = [tag for tag, share in (("common", 0.7), ("half", 0.5), ("rare", 0.03)) if rng.random() < share]
    return record_of(
        name,
        random_rows(rng, 1, dim)[0] * 3,
        tenant=tenant,
        visibility="public" if rng.random() < 0.5 else "private",
        tags=tuple(tags),
        own_scores=rng.uniform(-1, 1, rng.integers(3, 9)),
    )


CALLERS = [
    (tenant, tags)
    for tenant in ("big", "t0", "stranger")
    for tags in ((), ("common",), ("rare",), ("common", "half"), ("rare", "half"), ("unknown",))
]


@pytest.mark.parametrize("settings", [EXACT, LISTS], ids=["exact", "lists"])
@pytest.mark.parametrize("top_k", [1, 3, 16, 1000])
def test_search_equals_a_slow_loop_over_what_the_caller_may_use(top_k: int, settings: IndexSettings) -> None:
    rng = np.random.default_rng(top_k)
    records, queries = [labelled(rng, f"a{number}") for number in range(400)], random_rows(rng, 8)
    index = AdapterIndex.of(records, 16, settings)
    index = index.trained() if settings is LISTS else index
    for tenant, tags in CALLERS:
        usable = [record for record in records if may_use(record, tenant, tags)]
        allowed = index.allowed(tenant, tags)
        assert allowed.num == len(usable)
        for query, matches in zip(queries, index.search(queries, top_k, allowed), strict=True):
            assert_same(matches, slow_search(usable, query, top_k))


@pytest.mark.parametrize("settings", [EXACT, LISTS], ids=["exact", "lists"])
def test_every_generation_of_publishes_updates_and_withdrawals_equals_a_slow_loop(settings: IndexSettings) -> None:
    rng = np.random.default_rng(7)
    live = {(r.ref.tenant, r.ref.name): r for r in (labelled(rng, f"a{number}") for number in range(150))}
    index = AdapterIndex.of(list(live.values()), 16, settings)
    index = index.trained() if settings is LISTS else index
    generations = []
    for number in range(40):
        keys = list(live)
        gone = [keys[i] for i in rng.choice(len(keys), rng.integers(0, 5), replace=False)]
        updated = [live[key] for key in gone[::2]]
        new = [labelled(rng, f"new-{number}-{i}") for i in range(rng.integers(0, 5))]
        new += [replace(labelled(rng, old.ref.name), ref=replace(old.ref, digest=f"{number}")) for old in updated]
        live = {key: record for key, record in live.items() if key not in gone}
        live |= {(record.ref.tenant, record.ref.name): record for record in new}
        index = index.after([*gone, ("nobody", "unknown")], new)
        generations.append((index, live))
    queries = random_rows(rng, 3)
    for index, live in generations:  # the old ones have not changed
        assert index.num_live == len(live)
        for tenant, tags in CALLERS:
            usable = [record for record in live.values() if may_use(record, tenant, tags)]
            for query, matches in zip(queries, index.search(queries, 3, index.allowed(tenant, tags)), strict=True):
                assert_same(matches, slow_search(usable, query, 3))


def test_a_generation_can_be_extended_once_and_shares_its_vectors() -> None:
    index = index_of(random_rows(np.random.default_rng(0), 500))
    after = index.after([], [record_of("new", [1.0] * 16)])
    assert np.shares_memory(index._vectors, after._vectors)
    with pytest.raises(AssertionError):
        index.after([], [record_of("other", [1.0] * 16)])


@pytest.mark.parametrize("settings", [EXACT, LISTS], ids=["exact", "lists"])
def test_compacted_has_the_same_adapters_and_answers(settings: IndexSettings) -> None:
    rng = np.random.default_rng(4)
    records, queries = [labelled(rng, f"a{number}") for number in range(120)], random_rows(rng, 5)
    keys: list[Key] = [(record.ref.tenant, record.ref.name) for record in records[::3]]
    index = AdapterIndex.of(records, 16, settings).after(keys, [])
    compacted = index.compacted()
    assert (index.num_dead, index.num_positions) == (40, 120)
    assert (compacted.num_dead, compacted.num_positions, compacted.num_live) == (0, 80, 80)
    compacted = compacted.trained() if settings is LISTS else compacted
    for tenant, tags in CALLERS:
        before = index.search(queries, 5, index.allowed(tenant, tags))
        assert compacted.search(queries, 5, compacted.allowed(tenant, tags)) == before


@pytest.mark.parametrize("top_k", [1, 3, 5, 8])
@pytest.mark.parametrize("num_probes", [1, 4])
def test_a_small_tenant_gets_k_matches_in_a_big_pool_even_with_few_probes(top_k: int, num_probes: int) -> None:
    rng = np.random.default_rng(3)
    records = [record_of(f"a{number}", vector) for number, vector in enumerate(random_rows(rng, 2000))]
    own = [record_of(f"own-{n}", v, tenant="small", tags=("t",)) for n, v in enumerate(random_rows(rng, 5))]
    more = [record_of(f"m{n}", v, tags=("t",)) for n, v in enumerate(random_rows(rng, 60))]
    settings = IndexSettings(exact_rows=100, num_probes=num_probes)
    index = AdapterIndex.of([*records, *own, *more], 16, settings).trained()
    for query in random_rows(rng, 10):
        [matches] = index.search(query[np.newaxis], top_k, index.allowed("small", ["t"]))
        assert len(matches) == top_k
        [widest] = index.search(query[np.newaxis], 5000, index.allowed("small", ["t"]))
        assert len(widest) == 65
    few = AdapterIndex.of([*records, *[replace(r, visibility="private", tags=("x",)) for r in own]], 16, settings)
    few = few.trained()
    for query in random_rows(rng, 10):
        [matches] = few.search(query[np.newaxis], 8, few.allowed("small", ["x"]))
        assert_same(matches, slow_search(own, query, 8))  # five rows are read one by one in a pool of any size


@pytest.mark.parametrize("settings", [EXACT, LISTS], ids=["exact", "lists"])
@pytest.mark.parametrize("top_k", [4, 6, 20, 63, 70])
def test_ties_below_better_matches_are_sorted_by_name_too(top_k: int, settings: IndexSettings) -> None:
    rng = np.random.default_rng(top_k)
    vectors = np.repeat(random_rows(rng, 1), 80, axis=0)
    vectors[-4:] += random_rows(rng, 4) / 4
    [query] = unit_rows(vectors[-4:].mean(axis=0, keepdims=True))
    index = index_of(vectors, settings)
    [found] = index.search(query[np.newaxis], top_k, index.allowed())
    assert_same(found, slow_search(records_of(vectors), query, top_k))


@pytest.mark.parametrize("settings", [EXACT, LISTS], ids=["exact", "lists"])
def test_the_best_of_many_near_ties_are_found(settings: IndexSettings) -> None:
    rng = np.random.default_rng(6)
    queries = random_rows(rng, 30, 384)
    vectors = np.repeat(random_rows(rng, 1, 384), 200, axis=0) + rng.standard_normal((200, 384)) * 1e-8
    index = index_of(vectors.astype(np.float32), settings)
    exact = index._vectors.astype(np.float64) @ queries.T.astype(np.float64)
    for matches, scores in zip(index.search(queries, 3, index.allowed()), exact.T, strict=True):
        assert [match.score for match in matches] == pytest.approx(sorted(scores)[:-4:-1], abs=1e-12)


@pytest.mark.parametrize("settings", [EXACT, IndexSettings(exact_rows=100, num_probes=4)], ids=["exact", "lists"])
def test_an_answer_does_not_depend_on_its_batch(settings: IndexSettings) -> None:
    rng = np.random.default_rng(3)
    index, queries = index_of(random_rows(rng, 500, 384), settings), random_rows(rng, 64, 384)
    alone = [index.search(query[np.newaxis], 8, index.allowed())[0] for query in queries]
    assert index.search(queries, 8, index.allowed()) == alone


@pytest.mark.parametrize("settings", [EXACT, LISTS], ids=["exact", "lists"])
def test_a_query_with_nan_or_nothing_to_find_has_an_empty_list(settings: IndexSettings) -> None:
    index = index_of(random_rows(np.random.default_rng(0), 100), settings)
    queries = random_rows(np.random.default_rng(1), 3)
    queries[1, 5] = np.nan
    assert [len(matches) for matches in index.search(queries, 3, index.allowed())] == [3, 0, 3]
    empty = AdapterIndex.of([], 16)
    assert empty.search(queries, 3, empty.allowed()) == [[], [], []]
    one = empty.after([], [record_of("one", [1.0] * 16, visibility="private")])
    assert one.search(queries[:1], 3, one.allowed("other")) == [[]]
    assert one.search(queries[:0], 3, one.allowed()) == []
    assert [len(matches) for matches in one.search(queries[:1], 3, one.allowed("local"))] == [1]


@pytest.mark.parametrize("settings", [EXACT, LISTS], ids=["exact", "lists"])
def test_a_search_ends_where_a_vector_is_not_finite(settings: IndexSettings) -> None:
    rows = random_rows(np.random.default_rng(6), 60)
    index = index_of(rows, settings).after([], [record_of("nan", [np.nan] * 16)])
    for top_k in (1, 3, 61):
        [matches] = index.search(rows[:1], top_k, index.allowed())
        assert len(matches) <= top_k


def rows_read(allowed: Allowed) -> tuple[int, bool]:
    return len(allowed.positions), allowed.listed is not None


def test_few_rows_are_read_exactly_and_many_by_lists_plus_newer_rows() -> None:
    rng = np.random.default_rng(1)
    records = [
        record_of(f"a{n}", vector, tenant="small" if n < 25 else "big", visibility="private")
        for n, vector in enumerate(random_rows(rng, 400))
    ]
    settings = IndexSettings(exact_rows=100, side_rows=10)
    index = AdapterIndex.of(records, 16, settings)
    assert rows_read(index.allowed("big")) == (375, False)  # without lists all rows are read
    assert index.wants_rebuild
    index = index.trained()
    assert not index.wants_rebuild
    assert rows_read(index.allowed("small")) == (25, False)  # a quarter of exact_rows, because they are scattered
    assert rows_read(index.allowed("big")) == (0, True)
    index = index.after([], [record_of(f"n{n}", v) for n, v in enumerate(random_rows(rng, 10))])
    assert rows_read(index.allowed("big")) == (10, True)
    assert not index.wants_rebuild
    assert index.after([], [record_of("one more", [1.0] * 16)]).wants_rebuild


def test_a_quarter_of_dead_positions_requires_a_rebuild() -> None:
    index = index_of(random_rows(np.random.default_rng(0), 100))
    keys = [(record.ref.tenant, record.ref.name) for record in index.records]
    index = index.after(keys[:20], [])
    assert not index.wants_rebuild
    index = index.after(keys[20:21], [])
    assert (index.num_live, index.num_dead, index.wants_rebuild) == (79, 21, True)
    assert not index.compacted().wants_rebuild


@pytest.mark.parametrize("edit", [{"tags": tuple(f"{k}-" + 250 * "t" for k in range(32))}, {"contract": 16_384 * "c"}])
def test_edits_of_one_large_record_require_a_rebuild_early_but_not_often(edit: dict[str, Any]) -> None:
    index = index_of(random_rows(np.random.default_rng(0), 800))
    key = ("local", "edited")
    for number in range(52):
        assert not index.wants_rebuild
        index = index.after([key], [replace(record_of("edited", [1.0] * 16, version=str(number)), **edit)])
    assert (index.num_live, index.num_dead) == (801, 51)
    assert index.wants_rebuild
    assert not index.compacted().wants_rebuild


def test_edits_of_records_like_the_others_require_no_early_rebuild() -> None:
    tags = tuple(f"tag{k}" for k in range(32))
    vectors = random_rows(np.random.default_rng(0), 800)
    index = AdapterIndex.of([record_of(f"a{n}", vector, tags=tags) for n, vector in enumerate(vectors)], 16)
    for number in range(200):
        edited = record_of("a0", [1.0] * 16, version=str(number), tags=tags)
        index = index.after([("local", "a0")], [edited])
    assert (index.num_live, index.num_dead, index.wants_rebuild) == (800, 200, False)


def test_bytes_return_to_the_old_value_after_removals() -> None:
    vectors = random_rows(np.random.default_rng(0), 12)
    index = index_of(vectors).compacted()
    before = index.num_bytes
    for number in range(100):
        index = index.after([], [record_of(f"passing-{number}", vectors[0])])
        index = index.after([("local", f"passing-{number}")], [])
        index = index.compacted() if index.wants_rebuild else index
    assert index.compacted().num_bytes == before
    assert index.num_bytes < before + 100
