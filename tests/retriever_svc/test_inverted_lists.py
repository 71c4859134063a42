from __future__ import annotations

import numpy as np
import pytest

from retriever_svc.encoder import unit_rows
from retriever_svc.inverted_lists import InvertedLists

DIM = 24


def clustered(count: int, seed: int = 0) -> np.ndarray:
    """Return unit rows around twenty centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((20, DIM))
    return unit_rows((centres[rng.integers(0, 20, count)] + 0.5 * rng.standard_normal((count, DIM))).astype(np.float32))


VECTORS = clustered(3000)
LISTS = InvertedLists.train(VECTORS)
NUM_LISTS = 109  # 2 √3000


def masks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    near_one = VECTORS @ VECTORS[0] > 0.6
    assert 5 < near_one.sum() < 1000
    return {
        "all": np.ones(3000, np.bool_),
        "half": rng.random(3000) < 0.5,
        "few": np.isin(np.arange(3000), rng.choice(3000, 7, replace=False)),
        "one place": near_one,
        "none": np.zeros(3000, np.bool_),
    }


@pytest.mark.parametrize("kind", ["all", "half", "few", "one place"])
@pytest.mark.parametrize("num_wanted", [1, 16, 200])
def test_reading_all_lists_finds_the_best_within_the_codes_error(kind: str, num_wanted: int) -> None:
    mask = masks()[kind]
    part = LISTS.part_of(mask)
    for query in clustered(10, seed=1):
        exact = VECTORS @ query
        scores, positions = LISTS.best(query, num_wanted, part, NUM_LISTS)
        assert len(positions) == min(num_wanted, mask.sum())
        assert len(set(positions)) == len(positions)
        assert mask[positions].all()
        assert np.all(np.diff(scores) <= 0)
        np.testing.assert_allclose(scores, exact[positions], atol=LISTS.code_error)
        best = np.sort(exact[mask])[::-1][: len(positions)]
        np.testing.assert_allclose(scores, best, atol=LISTS.code_error)


@pytest.mark.parametrize("kind", ["all", "half", "few", "one place", "none"])
@pytest.mark.parametrize("num_wanted", [1, 5, 64, 4000])
def test_lists_are_read_until_there_is_enough(kind: str, num_wanted: int) -> None:
    mask = masks()[kind]
    part = LISTS.part_of(mask)
    assert part.sizes.sum() == mask.sum()
    for query in clustered(10, seed=2):
        _, positions = LISTS.best(query, num_wanted, part, 1)
        assert len(positions) == min(num_wanted, mask.sum())


def test_lists_without_visible_rows_use_no_probe() -> None:
    mask = masks()["one place"]
    part = LISTS.part_of(mask)
    assert len(part.lists) < NUM_LISTS / 2
    for query in clustered(20, seed=6):
        [score], _ = LISTS.best(query, 1, part, len(part.lists))
        assert score == pytest.approx((VECTORS[mask] @ query).max(), abs=LISTS.code_error)


def test_few_probes_find_most_best_matches() -> None:
    part = LISTS.part_of(masks()["all"])
    hits = [
        VECTORS[LISTS.best(query, 1, part, 16)[1][0]] @ query >= (VECTORS @ query).max() - 1e-3
        for query in clustered(100, seed=3)
    ]
    assert np.mean(hits) > 0.95


def test_saved_lists_answer_like_the_trained_ones_at_given_positions() -> None:
    moved = np.random.default_rng(8).permutation(4000)[:3000]
    gone = np.arange(3000) % 10 == 0
    lists = InvertedLists.from_bytes(LISTS.to_bytes(), np.where(gone, -1, moved))
    assert lists.num_gone == 300
    allowed = np.random.default_rng(9).random(4000) < 0.5
    part = lists.part_of(allowed)
    same = LISTS.part_of(allowed[moved] & ~gone)
    for query in clustered(10, seed=4):
        scores, positions = lists.best(query, 20, part, 16)
        expected, slots = LISTS.best(query, 20, same, 16)
        np.testing.assert_array_equal(scores, expected)
        np.testing.assert_array_equal(positions, moved[slots])
        assert allowed[positions].all()


def test_positions_in_no_list_are_returned_as_unlisted() -> None:
    positions = np.asarray([5, -1, 3, *range(10, 3007)])
    lists = InvertedLists.from_bytes(LISTS.to_bytes(), positions)
    mask = np.ones(3010, np.bool_)
    mask[[4, 3008]] = False
    assert lists.unlisted(mask).tolist() == [0, 1, 2, 6, 7, 8, 9, 3007, 3009]


def test_training_is_deterministic_small_and_exact_also_over_a_few_rows() -> None:
    np.testing.assert_array_equal(InvertedLists.train(VECTORS).to_bytes(), LISTS.to_bytes())
    assert 3000 * (DIM + 8) < LISTS.num_bytes < 3000 * (DIM + 8) * 3
    assert 0 < LISTS.code_error < 0.02
    for count in (1, 2, 5):
        lists = InvertedLists.train(VECTORS[:count])
        _, positions = lists.best(VECTORS[0], count, lists.part_of(np.ones(count, np.bool_)), 64)
        assert sorted(positions) == list(range(count))
