from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora_store.records import AdapterRecord
from retriever_svc import IndexSettings, calibrate_floor
from retriever_svc.calibration import NO_FLOOR, leave_one_out_scores
from retriever_svc.pool import Pool
from tests.retriever_svc.pool_fakes import FAKE_IDENTITY, FakeEncoder, record_of, snapshot_of

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
    assert (found(pool, "u"), pool.floor("u")) == (["a"], 0.5)
    after = pool.after(snapshot_of(replace(record, visibility="private"), generation=2))
    assert (found(after, "u"), after.floor("u")) == ([], NO_FLOOR)
    assert (found(after, "t"), after.floor("t")) == (["a"], 0.5)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ((), ["a", "ab", "b"]),
        (("x",), ["a", "ab"]),
        (("x", "y"), ["ab"]),
        (("y", "x", "y"), ["ab"]),
        (("z",), []),
        (("x", "z"), []),
    ],
)
def test_an_adapter_must_have_every_tag(tags: tuple[str, ...], expected: list[str]) -> None:
    pool = pool_of(
        record_of("a", EAST, tags=("x",)), record_of("b", EAST, tags=("y",)), record_of("ab", EAST, tags=("x", "y"))
    )
    assert found(pool, tags=tags) == expected


def test_the_adapters_a_caller_may_see_are_computed_once_per_generation() -> None:
    record = record_of("a", EAST, tags=("x", "y"))
    pool = pool_of(record)
    assert pool.allowed("t", ("x", "y")) is pool.allowed("t", ("y", "x"))
    assert pool.allowed("t") is not pool.allowed("u")
    after = pool.after(snapshot_of(record, record_of("b", EAST), generation=2))
    assert after.allowed("t").num == 2
    assert pool.allowed("t").num == 1


def test_equal_weights_are_returned_once_and_do_not_shorten_the_result() -> None:
    copies = [record_of(f"copy-{n:02}", EAST, weights="same") for n in range(20)]
    pool = pool_of(*copies, record_of("n", NORTH))
    assert found(pool, top_k=2) == ["copy-00", "n"]
    assert found(pool, top_k=16) == ["copy-00", "n"]


def test_private_adapters_of_others_have_no_vote_on_the_floor() -> None:
    rng = np.random.default_rng(0)
    groups = {name: rng.standard_normal((20, 4)) for name in ("public", "mine", "theirs")}
    scores = {name: leave_one_out_scores(group) for name, group in groups.items()}
    pool = pool_of(
        record_of("public", EAST, tenant="b", own_scores=scores["public"]),
        record_of("mine", EAST, tenant="a", visibility="private", own_scores=scores["mine"]),
        record_of("theirs", EAST, tenant="b", visibility="private", own_scores=scores["theirs"]),
        record_of("foreign", EAST, encoder="another", own_scores=[-1.0] * 50),
    )
    for tenant, seen in [("a", ("mine",)), ("b", ("public", "theirs")), ("c", ("public",))]:
        assert pool.floor(tenant) == pytest.approx(calibrate_floor([groups[name] for name in seen]), abs=1e-9)
    empty = pool_of(record_of("single", EAST))
    assert empty.floor("a") == NO_FLOOR


def test_an_index_rebuilt_during_requests_has_newer_changes() -> None:
    records = [record_of(f"a{n}", EAST) for n in range(5)]
    pool = pool_of(*records)
    index = pool.index.compacted()
    newest = pool.after(snapshot_of(*records[1:], record_of("new", EAST), generation=2))
    newest = newest.after(snapshot_of(*records[2:], record_of("new", NORTH, version="2"), generation=3))
    rebuilt = pool.rebuilt(index, newest)
    assert rebuilt.snapshot is newest.snapshot
    assert found(rebuilt) == found(newest) == ["a2", "a3", "a4", "new"]
    assert rebuilt.index.num_positions < newest.index.num_positions
    assert rebuilt.encoder.identity == FAKE_IDENTITY
