from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from lora_store.records import AdapterRecord
from lora_store.snapshot import Key
from retriever_svc import IndexSettings
from retriever_svc.calibration import NO_THRESHOLD, leave_one_out_scores
from retriever_svc.encoder import Vectors, unit_rows
from retriever_svc.index import AdapterIndex, Allowed, Match
from retriever_svc.pool import PerCallerCache, Pool, diff_records
from tests.retriever_svc.pool_fakes import FakeEncoder, record_of, snapshot_of

EAST, NORTH = (1.0, 0.0), (0.0, 1.0)
QUERY = np.asarray([EAST], np.float32)


def pool_of(*records: AdapterRecord, generation: int = 1) -> Pool:
    return Pool.of(snapshot_of(*records, generation=generation), FakeEncoder({}), IndexSettings())


def found(pool: Pool, tenant: str = "local", tags: tuple[str, ...] = (), top_k: int = 10) -> list[str]:
    [matches] = pool.nearest(QUERY, top_k, tenant, tags)
    return [match.record.ref.name for match in matches]


def test_the_next_generation_has_added_adapters_and_not_removed_ones() -> None:
    stays, goes, changes = record_of("stays", EAST), record_of("goes", EAST), record_of("changes", EAST)
    before = pool_of(stays, goes, changes)
    changed = record_of("changes", NORTH, version="2")
    after = before.after(snapshot_of(stays, changed, record_of("comes", EAST), generation=2))
    assert found(before) == ["changes", "goes", "stays"]
    assert found(after) == ["comes", "stays", "changes"]
    assert (before.snapshot.generation, after.snapshot.generation) == (1, 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_adapter_without_a_finite_vector_is_not_found(bad: float) -> None:
    broken = record_of("broken", (1.0, bad))
    pool = pool_of(broken, record_of("known", NORTH))
    assert found(pool) == ["known"]
    after = pool.after(snapshot_of(broken, record_of("known", NORTH), record_of("other", (bad, 0.0)), generation=2))
    assert found(after) == ["known"]
    assert after.embedded("local", "broken") == []


def test_an_adapter_is_not_found_until_the_encoder_embedded_it() -> None:
    bare, foreign = record_of("bare", None), record_of("foreign", EAST, encoder="another")
    pool = pool_of(bare, foreign, record_of("known", NORTH))
    assert found(pool) == ["known"]
    embedded = [replace(record, embedding=record_of("x", EAST).embedding) for record in (bare, foreign)]
    after = pool.after(snapshot_of(*embedded, generation=2))
    assert found(after) == ["bare", "foreign"]
    assert found(after.after(snapshot_of(bare, foreign, generation=3))) == []


def test_a_change_of_visibility_alone_is_seen() -> None:
    record = record_of("a", EAST, tenant="t", own_scores=[0.5] * 5)
    pool = pool_of(record)
    assert found(pool, "u") == ["a"]
    after = pool.after(snapshot_of(replace(record, visibility="private"), generation=2))
    assert found(after, "u") == []
    assert found(after, "t") == ["a"]


def test_equal_weights_are_returned_once_and_do_not_shorten_the_result() -> None:
    copies = [record_of(f"copy-{n:02}", EAST, weights="same") for n in range(20)]
    pool = pool_of(*copies, record_of("n", NORTH))
    assert found(pool, top_k=2) == found(pool, top_k=16) == ["copy-00", "n"]


def test_many_adapters_of_equal_weights_take_few_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each search reads all that score alike."""
    pool = pool_of(*[record_of(f"copy-{n:04}", EAST, weights="same") for n in range(1000)], record_of("n", NORTH))
    search, widths = AdapterIndex.search, list[int]()

    def counted(index: AdapterIndex, vectors: Vectors, top_k: int, allowed: Allowed) -> list[list[Match]]:
        widths.append(top_k)
        return search(index, vectors, top_k, allowed)

    monkeypatch.setattr(AdapterIndex, "search", counted)
    assert found(pool, top_k=3) == ["copy-0000", "n"]
    assert len(widths) <= 4


def test_the_adapters_a_caller_may_see_are_computed_once_per_generation() -> None:
    record = record_of("a", EAST, tags=("x", "y"))
    pool = pool_of(record)
    assert pool.allowed("t", ("x", "y")) is pool.allowed("t", ("y", "x"))
    assert pool.allowed("t") is not pool.allowed("u")
    after = pool.after(snapshot_of(record, record_of("b", EAST), generation=2))
    assert after.allowed("t").num == 2
    assert pool.allowed("t").num == 1
    before = pool.allowed("t")
    for number in range(300):
        pool.allowed("u", (f"tag-{number}",))
    assert pool.allowed("t") is before, "ever new tags of another caller change nothing"


def test_matches_are_judged_together_as_one_by_one() -> None:
    rng = np.random.default_rng(1)
    rows = [unit_rows(rng.standard_normal((20, 2)) + 2) for _ in range(5)]
    records = [
        record_of(f"a{n}", unit_rows(own.mean(axis=0)), own_scores=leave_one_out_scores(own))
        for n, own in enumerate(rows)
    ]
    angles = np.linspace(-2.6, -0.9, 10)  # ordinary prompts are on the other side
    ordinary = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    pool, fresh = (
        Pool.of(snapshot_of(*records), FakeEncoder({}), IndexSettings(), ordinary=ordinary) for _ in range(2)
    )
    asked = np.asarray([0.8, 0.2, -0.3, -1.5])
    queries = np.stack([np.cos(asked), np.sin(asked)], axis=1).astype(np.float32)
    found = [*pool.nearest(queries, 3, "local"), []]
    rows_judged = np.concatenate([queries, queries[:1]])
    judged = pool.judged(found, "strict", rows_judged)
    assert [[m.record for m in row] for row in judged] == [[m.record for m in row] for row in found]
    for query, row, plain in zip(rows_judged, judged, found, strict=True):
        for match, before in zip(row, plain, strict=True):
            fresh._near_ordinary.clear()
            [[alone]] = fresh.judged([[before]], "strict", query[np.newaxis])
            assert match[:2] == alone[:2] == before[:2]
            assert match.threshold == pytest.approx(alone.threshold, abs=1e-6)
            assert match.confidence <= alone.confidence + 1e-12  # the only candidate has the largest lead
    assert any(match.fits for row in judged for match in row)
    assert not all(match.fits for row in judged for match in row)
    assert pool.judged([[]], "strict", queries[:1]) == [[]]


def test_a_prompt_near_ordinary_prompts_has_higher_thresholds() -> None:
    records = [record_of("a", (1.0, 0.0), own_scores=np.linspace(0.5, 0.9, 20, dtype=np.float32))]
    rng = np.random.default_rng(3)
    ordinary = unit_rows(np.asarray([0, 1]) + 0.4 * rng.standard_normal((40, 2))).astype(np.float32)
    pool = Pool.of(snapshot_of(*records), FakeEncoder({}), IndexSettings(), ordinary=ordinary)
    queries = unit_rows(np.asarray([[3, 2], [3, -2]], np.float32))
    [[near], [far]] = pool.judged(pool.nearest(queries, 1, "local"), "balanced", queries)
    assert near.score == pytest.approx(far.score)
    assert near.threshold > far.threshold and near.confidence < far.confidence


def test_an_adapter_is_judged_by_the_vector_of_the_match_whatever_was_judged_before() -> None:
    """A tenant's evaluation gives a match another adapter's vector; that must not change the answers to others."""
    record = record_of("a", EAST)
    elsewhere = replace(record, embedding=record_of("x", NORTH).embedding)
    angles = np.linspace(1.2, 1.9, 10)  # near the other vector
    ordinary = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    def thresholds(*records: AdapterRecord) -> list[float]:
        pool = Pool.of(snapshot_of(record), FakeEncoder({}), IndexSettings(), ordinary=ordinary)
        judged = [pool.judged([[Match(one, 0.9)]], "balanced", QUERY)[0][0] for one in records]
        return [match.threshold for match in judged]

    [own], [other] = thresholds(record), thresholds(elsewhere)
    assert own != other
    assert thresholds(elsewhere, record, elsewhere) == [other, own, other]


def test_without_a_projection_prompts_are_compared_from_the_mean_of_the_ordinary_ones() -> None:
    """What all vectors share is taken away: the same judgements as of vectors that never shared it."""
    rng = np.random.default_rng(5)
    half = unit_rows(rng.standard_normal((5, 8))).astype(np.float32)
    ordinary = np.concatenate([half, -half])  # so their mean is what all vectors share
    tasks = unit_rows(rng.standard_normal((3, 8))).astype(np.float32)
    queries = np.concatenate([tasks[:2], half[:1]]) + 0.1 * rng.standard_normal((3, 8))
    queries = unit_rows(queries).astype(np.float32)

    def judged(shared: float) -> list[list[Match]]:
        """Judge after adding the same large part to every vector, if `shared` is more than 0."""
        parts = [np.hstack([part, np.full((len(part), 1), shared)]) for part in (ordinary, tasks, queries)]
        rows, adapters, asked = [unit_rows(part.astype(np.float32)) for part in parts]
        records = [record_of(f"a{n}", row, own_scores=[0.0] * 20) for n, row in enumerate(adapters)]
        centre = rows.mean(axis=0) if shared else None
        pool = Pool.of(snapshot_of(*records), FakeEncoder({}, dim=9), IndexSettings(), ordinary=rows, centre=centre)
        return pool.judged(pool.nearest(asked, 3, "local"), "balanced", asked)

    found = list(zip(judged(0), judged(3), strict=True))
    for plain, moved in found:
        assert [match.record.ref for match in moved] == [match.record.ref for match in plain]
        assert [match.fits for match in moved] == [match.fits for match in plain]
        for one, other in zip(plain, moved, strict=True):
            if other.threshold < 1:  # the highest that is shown
                assert other.score - other.threshold == pytest.approx(one.score - one.threshold, abs=1e-5)
            assert other.confidence == pytest.approx(one.confidence, abs=1e-4)
    assert [plain[0].fits for plain, _ in found] == [True, True, False]
    rows = unit_rows(rng.standard_normal((9, 2)) + 3).astype(np.float32)
    options = {"ordinary": rows, "centre": rows.mean(axis=0)}
    pool = Pool.of(snapshot_of(record_of("a", EAST)), FakeEncoder({}), IndexSettings(), **options)
    [[match]] = pool.judged(pool.nearest(QUERY, 1, "local"), "never", QUERY)
    assert match.threshold == NO_THRESHOLD


def test_ever_new_tags_do_not_fill_the_memory() -> None:
    cache: PerCallerCache[int] = PerCallerCache()
    cache.get(("kept",), lambda: -1)
    for number in range(2000):
        cache.get(("t", f"tag-{number}"), lambda number=number: number)
        assert cache.get(("kept",), lambda: -2) == -1
    assert len(cache._values) <= 256


Records = dict[Key, AdapterRecord]


def pool(count: int) -> Records:
    return {("local", f"a{n}"): record_of(f"a{n}", None) for n in range(count)}


def applied(old: Records, gone: list[Key], came: list[AdapterRecord]) -> Records:
    assert len(set(gone)) == len(gone)
    assert len({record.ref for record in came}) == len(came)
    rest = {key: record for key, record in old.items() if key not in gone}
    assert all(("local", record.ref.name) not in rest for record in came)
    return rest | {("local", record.ref.name): record for record in came}


@pytest.mark.parametrize("count", [0, 1, 30, 9000])
@pytest.mark.parametrize("seed", range(3))
def test_any_changes_are_found_and_nothing_else(count: int, seed: int) -> None:
    rng, old = random.Random(seed), pool(count)
    new, changed = dict(old), set()
    for step in range(rng.randrange(12)):
        key = ("local", f"a{rng.randrange(count + 3)}")
        match rng.randrange(3):
            case 0:
                new.pop(key, None)
            case 1:
                new[key] = record_of(key[1], None, version=f"{step}")
            case _:  # withdrawn and published again, so it is at the end
                new.pop(key, None)
                new[key] = record_of(key[1], None, version=f"{step}")
        changed.add(key)
    gone, came = diff_records(old, new)
    assert applied(old, gone, came) == new
    assert {*gone, *(("local", record.ref.name) for record in came)} <= changed


@pytest.mark.parametrize("count", [3, 5000])
def test_moved_records_count_as_removed_and_new(count: int) -> None:
    old = pool(count)
    new = dict(sorted(old.items(), key=lambda item: item[0], reverse=True))
    gone, came = diff_records(old, new)
    assert applied(old, gone, came) == new
    moved = dict([*list(old.items())[1:], next(iter(old.items()))])
    assert diff_records(old, moved) == ([("local", "a0")], [old["local", "a0"]])
    assert diff_records(old, {}) == (list(old), [])
    assert diff_records({}, old) == ([], list(old.values()))
    again = record_of("a2", None)  # an equal but different object, whose embedding may differ
    assert diff_records(old, old | {("local", "a2"): again}) == ([("local", "a2")], [again])
