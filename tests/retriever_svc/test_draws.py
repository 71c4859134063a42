"""The prompts that a version would draw, with chosen vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from lora_store.adapter import Sample
from lora_store.records import AdapterRecord
from retriever_svc import IndexSettings
from retriever_svc.draws import LETTER_PARTS, MAX_ADAPTERS, MAX_SAMPLES, DrawMeasurement, Drawn, DrawnAdapter, Draws
from retriever_svc.ordinary_prompts import bare_words, ordinary_prompts
from retriever_svc.pool import Pool
from tests.retriever_svc.pool_fakes import FakeEncoder, record_of, snapshot_of

EAST, NORTH, NORTHEAST = (1.0, 0.0), (0.0, 1.0), (0.8, 0.6)
SOUTHEAST = (0.96, -0.28)
PLEASE = "Draw a map for me, please: "
ENCODER = FakeEncoder(
    {
        "east": EAST,
        "northeast": NORTHEAST,
        "north": NORTH,
        f"{PLEASE}coasts of Norway": NORTH,
        f"{PLEASE}old towns by night": NORTH,
        "coasts of Norway": EAST,
        "old towns by night": EAST,
    }
)
SAMPLES = {
    "maps": ["east", "northeast"],
    "stars": ["north"],
    "worded": [f"{PLEASE}coasts of Norway", f"{PLEASE}old towns by night"],
    "many": ["east"] * (MAX_SAMPLES + 9),
}
ALL = Drawn(2, 2, 2)


def adapter(name: str, vector: Sequence[float], tenant: str, *, approved: bool = True) -> AdapterRecord:
    return record_of(name, vector, tenant=tenant, approved=approved, num_samples=2)


MAPS = adapter("maps", (0.95, 0.31), "acme")
STARS = adapter("stars", NORTH, "acme")


def samples_of(record: AdapterRecord) -> list[Sample]:
    return [Sample(text) for text in SAMPLES[record.ref.name]]


def drawn(record: AdapterRecord, *others: AdapterRecord) -> Draws:
    pool = Pool.of(snapshot_of(*others, record), ENCODER, IndexSettings(requires_approval=True))  # type: ignore[arg-type]
    measurement = DrawMeasurement.of(pool, record, samples_of)
    measurement.encoding.encode_all()
    return measurement.result("balanced")


@pytest.mark.parametrize("approved", [False, True])
def test_a_copy_would_draw_every_sample_of_the_copied_adapter(approved: bool) -> None:
    copy = adapter("copy", (0.95, 0.31), "mallory", approved=approved)
    draws = drawn(copy, MAPS, STARS)
    assert draws.adapters == (DrawnAdapter(MAPS.ref, ALL, ALL, similarity=pytest.approx(1, abs=0.01)),)
    assert draws.must_be_confirmed


def test_an_adapter_is_compared_by_the_scores_of_its_samples_to_the_others() -> None:
    """Each of the two samples has 0.8 to the other one, and 0.95 or more to the mean of both."""
    [maps] = drawn(adapter("near", SOUTHEAST, "mallory"), MAPS).adapters
    assert maps.samples == Drawn(2, 1, 1)


def test_a_copy_in_other_words_draws_the_contents() -> None:
    worded = adapter("worded", NORTHEAST, "acme")
    [found] = drawn(adapter("copy", EAST, "mallory"), worded).adapters
    assert (found.samples, found.contents) == (Drawn(2, 0, 0), ALL)
    assert found.must_be_confirmed


def test_an_adapter_that_is_near_anothers_is_confirmed_although_it_draws_nothing() -> None:
    """A cosine of 0.7 is that of two adapters for one task, in whatever words."""
    for cosine, is_asked in ((0.71, True), (0.69, False)):
        draws = drawn(adapter("like", (-((1 - cosine**2) ** 0.5), cosine), "mallory"), STARS)
        assert draws.must_be_confirmed == is_asked == bool(draws.adapters)
        for found in draws.adapters:
            assert (found.samples.by_owner, found.similarity) == (0, pytest.approx(cosine, abs=1e-4))


def test_an_adapter_of_one_text_is_compared_by_that_text_and_loses_a_tie() -> None:
    assert drawn(adapter("near", NORTHEAST, "mallory"), STARS).adapters == ()
    [stars] = drawn(adapter("copy", NORTH, "mallory"), STARS).adapters
    assert stars.samples == Drawn(1, 1, 1)


def test_all_approved_adapters_of_the_owner_count_together() -> None:
    second = adapter("second", (0.0, -1.0), "mallory", approved=False)
    first = adapter("first", (0.95, 0.31), "mallory")
    waiting = adapter("waiting", (0.95, 0.31), "mallory", approved=False)
    assert [found.samples for found in drawn(second, MAPS, first).adapters] == [Drawn(2, 0, 2)]
    assert drawn(second, MAPS, waiting).adapters == ()


@pytest.mark.parametrize(
    ("samples", "contents", "is_asked"),
    [
        (Drawn(10, 0, 9), Drawn(10, 0, 9), False),  # by other adapters, which were confirmed
        (Drawn(20, 1, 1), Drawn(20, 10, 10), False),
        (Drawn(20, 1, 2), Drawn(20, 0, 0), True),
        (Drawn(20, 0, 0), Drawn(20, 1, 11), True),
    ],
)
def test_a_version_is_confirmed_if_its_owner_would_draw_many_prompts_of_an_adapter(
    samples: Drawn, contents: Drawn, is_asked: bool
) -> None:
    found = DrawnAdapter(MAPS.ref, samples, contents)
    assert Draws(Drawn(535, 0, 0), (found,)).must_be_confirmed == is_asked


def test_a_version_is_confirmed_if_its_owner_would_draw_more_than_a_tenth_of_ordinary_prompts() -> None:
    assert [Draws(Drawn(500, 1, by_owner)).must_be_confirmed for by_owner in (50, 51)] == [False, True]
    assert [Draws(Drawn(40, 1, by_owner), (), 0.05).must_be_confirmed for by_owner in (2, 3)] == [False, True]


def test_adapters_that_other_tenants_do_not_find_are_no_victims() -> None:
    copy = adapter("copy", (0.95, 0.31), "mallory")
    hidden = replace(MAPS, visibility="private")
    assert drawn(copy, hidden).adapters == drawn(copy, replace(MAPS, approved=False)).adapters == ()
    assert drawn(copy, adapter("maps", EAST, "mallory")).adapters == ()  # its own


def test_the_nearest_of_others_are_measured_behind_many_of_the_owner_up_to_a_bound() -> None:
    own = [adapter(f"own-{number}", EAST, "mallory") for number in range(2 * MAX_ADAPTERS)]
    assert drawn(adapter("copy", EAST, "mallory"), MAPS, *own).adapters[0].ref == MAPS.ref
    [many] = drawn(adapter("copy", EAST, "mallory"), adapter("many", EAST, "acme")).adapters
    assert many.samples.num == many.contents.num == MAX_SAMPLES


@pytest.mark.parametrize("vector", [None, EAST])
def test_a_version_that_auto_cannot_find_draws_nothing(vector: Sequence[float] | None) -> None:
    record = record_of("copy", vector, tenant="mallory", encoder="another")
    assert drawn(record, MAPS) == Draws(Drawn(0, 0, 0))


ROWS = np.eye(6, dtype=np.float32)


def measured(record: AdapterRecord, ordinary: np.ndarray, *others: AdapterRecord, letters: int) -> DrawMeasurement:
    """Return a measurement beside these ordinary prompts. All parts of letters lie on the axis `letters`."""
    encoder = FakeEncoder(dict.fromkeys(LETTER_PARTS, ROWS[letters]), dim=6)  # type: ignore[arg-type]
    pool = Pool.of(snapshot_of(*others, record), encoder, IndexSettings(), ordinary=ordinary)  # type: ignore[arg-type]
    measurement = DrawMeasurement.of(pool, record, lambda _: ())
    measurement.encoding.encode_all()
    return measurement


def test_ordinary_prompts_are_compared_with_the_others() -> None:
    """The prompt that the version is a little like would not be answered if it were compared with itself."""
    ordinary = ROWS[[0, 1, 1, 1]]
    record = record_of("odd", 0.2 * ROWS[0] + 0.96**0.5 * ROWS[5], tenant="mallory")
    measurement = measured(record, ordinary, letters=1)
    assert measurement.result("balanced").ordinary == Drawn(4, 1, 1)
    assert measurement.result("never").ordinary == Drawn(4, 4, 4)
    assert measurement.result("balanced", min_score=0.3).ordinary == Drawn(4, 0, 0)


@pytest.mark.parametrize(("axis", "num"), [(0, 616), (1, 517), (2, len(LETTER_PARTS))])
def test_bare_words_parts_of_letters_and_other_ordinary_prompts_are_measured_apart(axis: int, num: int) -> None:
    ordinary = np.where(bare_words(len(ordinary_prompts()))[:, np.newaxis], ROWS[0], ROWS[1])
    record = record_of("greeter", ROWS[axis], tenant="mallory")
    found = measured(record, ordinary, letters=2).result("balanced", min_score=0.5)
    assert (found.ordinary, found.must_be_confirmed) == (Drawn(num, num, num), True)


def test_a_version_that_draws_the_smaller_share_of_its_owner_is_confirmed_too() -> None:
    """The owner's approved adapters lead every bare word. The version leads many of the other ordinary prompts."""
    is_word = bare_words(len(ordinary_prompts()))
    ordinary = np.where(is_word[:, np.newaxis], ROWS[0], ROWS[1])
    ordinary[np.flatnonzero(~is_word)[144:]] = ROWS[2]
    words = record_of("words", ROWS[0], tenant="mallory")
    record = record_of("greeter", ROWS[1], tenant="mallory")
    found = measured(record, ordinary, words, letters=3).result("balanced", min_score=0.5)
    assert (found.ordinary, found.must_be_confirmed) == (Drawn(517, 144, 144), True)
