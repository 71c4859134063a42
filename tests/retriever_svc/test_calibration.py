from __future__ import annotations

import numpy as np
import pytest

from retriever_svc import calibrate_floor
from retriever_svc.calibration import NO_FLOOR, count_levels, floor_of, leave_one_out_scores, score_levels
from retriever_svc.encoder import unit_rows


def slow_floor(groups: list[np.ndarray]) -> float:
    scores = []
    for group in groups:
        for left_out in range(len(group)):
            others = [group[i].astype(np.float64) for i in range(len(group)) if i != left_out]
            if others:
                mean = sum(others) / len(others)
                scores.append(float(group[left_out] @ mean / np.linalg.norm(mean)))
    return float(np.percentile(scores, 1))


@pytest.mark.parametrize("sizes", [[20] * 10, [1, 2, 200, 3, 1], [2]])
def test_floor_equals_a_slow_leave_one_out_loop_to_four_decimals(sizes: list[int]) -> None:
    rng = np.random.default_rng(len(sizes))
    groups = [unit_rows((rng.standard_normal(8) + rng.standard_normal((size, 8))).astype(np.float32)) for size in sizes]
    assert calibrate_floor(groups) == pytest.approx(slow_floor(groups), abs=5.1e-5)


@pytest.mark.parametrize("num_scores", [1, 2, 3, 99, 100, 101, 102, 5000])
def test_the_floor_is_numpys_percentile_of_the_rounded_scores(num_scores: int) -> None:
    scores = np.random.default_rng(num_scores).uniform(-1, 1, num_scores).astype(np.float32)
    expected = np.percentile(np.round(scores.astype(np.float64), 4), 1)
    assert floor_of(count_levels([score_levels(scores)])) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("groups", [[], [np.ones((1, 4))], [np.empty((0, 4))]], ids=["none", "single", "empty"])
def test_without_two_samples_anywhere_there_is_no_floor(groups: list[np.ndarray]) -> None:
    assert calibrate_floor(groups) == NO_FLOOR


def test_one_percent_of_the_samples_fall_below_the_floor() -> None:
    rng = np.random.default_rng(0)
    groups = [unit_rows(rng.standard_normal((20, 8)).astype(np.float32)) for _ in range(50)]
    scores = np.concatenate([leave_one_out_scores(group) for group in groups])
    assert abs((scores < calibrate_floor(groups)).sum() - 10) <= 1


def test_others_that_cancel_out_score_zero() -> None:
    np.testing.assert_array_equal(leave_one_out_scores(np.asarray([[1, 0], [0, 1], [0, -1]]))[0], 0)


def test_counts_of_pools_add_up() -> None:
    rng = np.random.default_rng(1)
    one, other = (score_levels(rng.uniform(-1, 1, 300).astype(np.float32)) for _ in range(2))
    np.testing.assert_array_equal(count_levels([one]) + count_levels([other]), count_levels([one, other]))


def test_scores_a_hair_beyond_one_count_as_one() -> None:
    np.testing.assert_array_equal(score_levels(np.asarray([1.0000001, -1.0000001], np.float32)), [10_000, -10_000])
