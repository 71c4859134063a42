"""The map of a pool: its points, the place of a prompt, and the effect of another generation."""

from __future__ import annotations

import numpy as np
import pytest

from lora_store.records import AdapterRecord
from retriever_svc import IndexSettings, PoolMap, PoolSize, Retriever, pool
from retriever_svc.index import AdapterIndex
from retriever_svc.pool import Pool
from tests.retriever_svc.pool_fakes import FakeEncoder, Source, live_pool, record_of, snapshot_of

EAST, NORTH, WEST = (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)
PUBLIC = (record_of("east", EAST), record_of("north", NORTH), record_of("west", WEST))
PRIVATE = record_of("secret", (0.6, -0.8), tenant="them", visibility="private")


def names_on(drawn: PoolMap) -> list[str]:
    return sorted(drawn.names)


def retriever_of(*records: AdapterRecord) -> Retriever:
    return Retriever(live_pool(FakeEncoder({"go east": EAST, "go north": NORTH}), Source(*records)))


def test_the_map_has_the_adapters_that_auto_may_choose() -> None:
    retriever = retriever_of(*PUBLIC, PRIVATE, record_of("bare", None))
    drawn = retriever.map("local")
    assert names_on(drawn) == ["east", "north", "west"]
    assert (drawn.num_adapters, drawn.generation) == (3, 1)
    assert names_on(retriever.map("them")) == ["local/east", "local/north", "local/west", "secret"]
    asked = ["east@0123456789", "secret", "them/secret", "bare"]  # of a version, and invisible ones
    assert [point.ref.name for point in retriever.place("local", "go east", asked).adapters if point.ref] == ["east"]
    assert (retriever.count("local"), retriever.count("them")) == (PoolSize(1, 4), PoolSize(1, 5))
    without = retriever_of(*PUBLIC, record_of("bare", None))
    assert drawn == without.map("local"), "private adapters do not change the map of others"
    assert retriever.place("local", "go east", []) == without.place("local", "go east", [])
    empty = retriever_of()
    assert empty.map("local").names == ()
    place = empty.place("local", "go east", [])
    assert (place.prompt.x, place.prompt.y, place.adapters) == (0.0, 0.0, ())


def test_a_prompt_has_the_place_of_an_adapter_with_the_same_embedding() -> None:
    retriever = retriever_of(*PUBLIC)
    place = retriever.place("local", "go north", ["west", "north", "nobody"])
    drawn = retriever.map("local")
    on_map = dict(zip(drawn.names, drawn.places, strict=True))
    assert (place.prompt.x, place.prompt.y) == on_map["north"]
    assert [(point.ref.name, (point.x, point.y)) for point in place.adapters if point.ref is not None] == [
        ("west", on_map["west"]),
        ("north", on_map["north"]),
    ]


def test_a_map_is_computed_once_per_generation_and_caller() -> None:
    now = Pool.of(snapshot_of(*PUBLIC), FakeEncoder({}), IndexSettings())
    assert now.map("local") is now.map("local")
    assert now.after(snapshot_of(*PUBLIC[:2], generation=2)).map("local")[1].num_adapters == 2


def test_maps_are_kept_up_to_a_number_of_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_MAX_POINTS_KEPT", 2 * len(PUBLIC))
    now = Pool.of(snapshot_of(*PUBLIC), FakeEncoder({}), IndexSettings())
    first, second = now.map("one"), now.map("two")
    assert now.map("one") is first
    now.map("three")
    assert now.map("one") is first and now.map("two") is not second


def test_a_large_pool_is_shown_in_part_evenly() -> None:
    num, most = 600, 200
    index = AdapterIndex.of([record_of(f"a{number:05}", EAST) for number in range(num)], 2)
    found, records, vectors = index.spread("local", most)
    assert (found, len(records), vectors.shape) == (num, most, (most, 2))
    assert [record.ref.name for record in records] == [f"a{number:05}" for number in range(0, num, 3)]
    assert np.array_equal(vectors[0], np.asarray(EAST, np.float32))


def test_adapters_omitted_from_a_large_map_are_placed_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "MAX_POINTS", 100)
    angles = np.linspace(0, 1, 101)
    records = [record_of(f"a{n:05}", (float(np.cos(t)), float(np.sin(t)))) for n, t in enumerate(angles)]
    retriever = retriever_of(*records)
    drawn = retriever.map("local")
    [left_out] = {record.ref.name for record in records} - set(names_on(drawn))
    assert (len(drawn.names), drawn.num_adapters) == (100, 101)
    assert [point.ref.name for point in retriever.place("local", "go east", [left_out]).adapters if point.ref] == [
        left_out
    ]
