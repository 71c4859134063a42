"""What a version would draw, with chosen vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from lora_store.adapter import Sample
from lora_store.records import AdapterRecord
from retriever_svc import IndexSettings
from retriever_svc.draws import MAX_ADAPTERS, MAX_SAMPLES, DrawMeasurement, Drawn, Draws
from retriever_svc.pool import Pool
from tests.retriever_svc.pool_fakes import FakeEncoder, record_of, snapshot_of

EAST, NORTH, NEAR = (1.0, 0.0), (0.0, 1.0), (0.8, 0.6)
ENCODER = FakeEncoder({"east": EAST, "north": NORTH, "east again": EAST})
SAMPLES = {"maps": ["east", "east again"], "stars": ["north"], "many": ["east"] * (MAX_SAMPLES + 9)}


def adapter(
    name: str, vector: Sequence[float], tenant: str, *, approved: bool = True, own: Sequence[float] = (0.9, 0.9)
) -> AdapterRecord:
    return record_of(name, vector, tenant=tenant, approved=approved, own_scores=own, num_samples=2)


MAPS = adapter("maps", EAST, "acme")
STARS = adapter("stars", NORTH, "acme")


def drawn(record: AdapterRecord, *others: AdapterRecord) -> Draws:
    pool = Pool.of(snapshot_of(*others, record), ENCODER, IndexSettings(requires_approval=True))  # type: ignore[arg-type]
    measurement = DrawMeasurement.of(pool, record, lambda victim: [Sample(text) for text in SAMPLES[victim.ref.name]])
    measurement.encoding.encode_all()
    return measurement.result("balanced")


@pytest.mark.parametrize("approved", [False, True])
def test_a_copy_would_draw_every_sample_of_the_copied_adapter(approved: bool) -> None:
    copy = adapter("copy", EAST, "mallory", approved=approved)
    draws = drawn(copy, MAPS, STARS)
    assert draws.adapters == ((MAPS.ref, Drawn(2, 2, 2)),)
    assert draws.must_be_confirmed


def test_an_adapter_is_compared_by_the_scores_of_its_samples_to_the_others() -> None:
    maps = adapter("maps", EAST, "acme", own=(0.7, 0.9))
    assert drawn(adapter("near", NEAR, "mallory"), maps).adapters == ((maps.ref, Drawn(2, 1, 1)),)


def test_an_adapter_of_one_text_is_compared_by_that_text_and_loses_a_tie() -> None:
    alone = adapter("stars", NORTH, "acme", own=())
    assert drawn(adapter("near", NEAR, "mallory"), alone).adapters == ()
    assert drawn(adapter("copy", NORTH, "mallory"), alone).adapters == ((alone.ref, Drawn(1, 1, 1)),)


def test_all_approved_adapters_of_the_owner_count_together() -> None:
    second = adapter("second", NEAR, "mallory", approved=False)
    first = adapter("first", EAST, "mallory", own=())
    waiting = adapter("waiting", EAST, "mallory", approved=False)
    assert drawn(second, MAPS, first).adapters == ((MAPS.ref, Drawn(2, 0, 2)),)
    assert drawn(second, MAPS, waiting).adapters == ()


@pytest.mark.parametrize(
    ("by_version", "by_owner", "is_asked"), [(0, 9, False), (1, 2, False), (1, 3, True), (3, 3, True)]
)
def test_a_version_is_confirmed_if_its_owner_would_draw_more_than_a_fifth(
    by_version: int, by_owner: int, is_asked: bool
) -> None:
    drawn = Drawn(10, by_version, by_owner)
    assert Draws(Drawn(535, 0, 0), ((MAPS.ref, drawn),)).must_be_confirmed == is_asked


@pytest.mark.parametrize(("by_owner", "is_asked"), [(10, False), (11, True)])
def test_a_version_is_confirmed_if_its_owner_would_draw_more_than_2_percent_of_ordinary_prompts(
    by_owner: int, is_asked: bool
) -> None:
    assert Draws(Drawn(500, 1, by_owner)).must_be_confirmed == is_asked


def test_adapters_that_other_tenants_do_not_find_are_no_victims() -> None:
    copy = adapter("copy", EAST, "mallory")
    hidden = replace(MAPS, visibility="private")
    assert drawn(copy, hidden).adapters == drawn(copy, replace(MAPS, approved=False)).adapters == ()
    assert drawn(copy, adapter("maps", EAST, "mallory")).adapters == ()  # its own


def test_the_nearest_adapters_of_others_are_measured_behind_many_of_the_owner() -> None:
    own = [adapter(f"own-{number}", EAST, "mallory") for number in range(2 * MAX_ADAPTERS)]
    assert drawn(adapter("copy", EAST, "mallory"), MAPS, *own).adapters[0][0] == MAPS.ref


def test_at_most_so_many_samples_are_encoded() -> None:
    many = adapter("many", EAST, "acme", own=(0.5,) * len(SAMPLES["many"]))
    assert drawn(adapter("copy", EAST, "mallory"), many).adapters == (
        (many.ref, Drawn(MAX_SAMPLES, *[MAX_SAMPLES] * 2)),
    )


@pytest.mark.parametrize("vector", [None, EAST])
def test_a_version_that_auto_cannot_find_draws_nothing(vector: Sequence[float] | None) -> None:
    record = record_of("copy", vector, tenant="mallory", encoder="another")
    assert drawn(record, MAPS) == Draws(Drawn(0, 0, 0))


def test_ordinary_prompts_are_compared_with_the_others() -> None:
    """The prompt that the version is a little like would not be answered if it were compared with itself."""
    rows = np.eye(6, dtype=np.float32)
    rows[1:4] = rows[1]
    vector = 0.2 * rows[0] + 0.96**0.5 * rows[5]
    record = record_of("odd", vector, tenant="mallory")
    pool = Pool.of(snapshot_of(record), FakeEncoder({}, dim=6), IndexSettings(), ordinary=rows[:4])  # type: ignore[arg-type]
    measurement = DrawMeasurement.of(pool, record, lambda _: ())
    assert measurement.result("balanced").ordinary == Drawn(4, 1, 1)
    assert measurement.result("never").ordinary == Drawn(4, 4, 4)
    assert measurement.result("balanced", min_score=0.3).ordinary == Drawn(4, 0, 0)
