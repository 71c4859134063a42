from __future__ import annotations

import math

import numpy as np
import pytest

from retriever_svc import calibrate_floor
from retriever_svc.calibration import (
    MIN_SCORES,
    NO_FLOOR,
    NO_VOTE,
    floor_of,
    leave_one_out_scores,
    vote_of,
)
from retriever_svc.encoder import unit_rows


def groups_of(sizes: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(len(sizes))
    return [unit_rows((rng.standard_normal(8) + rng.standard_normal((size, 8))).astype(np.float32)) for size in sizes]


def slow_floor(groups: list[np.ndarray]) -> float:
    votes = []
    for group in groups:
        scores = []
        for left_out in range(len(group)):
            others = [group[i].astype(np.float64) for i in range(len(group)) if i != left_out]
            if others:
                mean = sum(others) / len(others)
                scores.append(float(group[left_out] @ mean / np.linalg.norm(mean)))
        if len(scores) >= 5:
            votes.append(np.percentile(scores, 1))
    return float(np.percentile(votes, 20))


@pytest.mark.parametrize("sizes", [[20] * 10, [1, 5, 200, 6, 4], [5]])
def test_floor_equals_a_slow_leave_one_out_loop(sizes: list[int]) -> None:
    groups = groups_of(sizes)
    assert calibrate_floor(groups) == pytest.approx(slow_floor(groups), abs=1e-6)


@pytest.mark.parametrize("num_scores", [5, 6, 100, 101, 102, 5000])
def test_a_vote_is_numpys_first_percentile_of_the_own_scores(num_scores: int) -> None:
    scores = np.random.default_rng(num_scores).uniform(-1, 1, num_scores).astype(np.float32)
    assert vote_of(scores) == pytest.approx(np.percentile(scores.astype(np.float64), 1), abs=1e-6)


@pytest.mark.parametrize("groups", [[], [np.ones((1, 4))], [np.empty((0, 4))], groups_of([MIN_SCORES - 1] * 9)])
def test_without_an_adapter_of_enough_samples_there_is_no_floor(groups: list[np.ndarray]) -> None:
    assert calibrate_floor(groups) == NO_FLOOR


def test_an_adapter_has_one_vote_for_any_number_of_samples() -> None:
    short, long = groups_of([20, 20, 20, 20, 20]), groups_of([20, 20, 20, 20, 20])
    long[0] = np.concatenate([long[0]] * 10)  # nearly the same scores, ten times
    assert calibrate_floor(long) == pytest.approx(calibrate_floor(short), abs=0.02)


def test_an_adapter_of_few_samples_does_not_move_the_floor() -> None:
    groups = groups_of([20] * 6)
    assert calibrate_floor([*groups, *groups_of([MIN_SCORES - 1] * 50)]) == calibrate_floor(groups)


def test_others_that_cancel_out_score_zero() -> None:
    np.testing.assert_array_equal(leave_one_out_scores(np.asarray([[1, 0], [0, 1], [0, -1]]))[0], 0)


def test_scores_slightly_above_one_count_as_one() -> None:
    assert vote_of(np.full(9, 1.0000001, np.float32)) == 1.0
    assert vote_of(np.full(9, -1.0000001, np.float32)) == -1.0


@pytest.mark.parametrize("num_trusted", [1, 2, 4, 5, 50])
@pytest.mark.parametrize("stranger", [-1.0, 0.0, 1.0])
def test_other_tenants_do_not_move_a_floor_that_has_a_trusted_vote(num_trusted: int, stranger: float) -> None:
    trusted = np.append(np.linspace(0.6, 0.8, num_trusted), NO_VOTE)
    assert floor_of(trusted, np.full(9, stranger)) == floor_of(trusted) >= 0.6


@pytest.mark.parametrize("trusted", [np.empty(0), np.full(3, NO_VOTE)])
def test_other_tenants_vote_if_there_is_no_trusted_vote(trusted: np.ndarray) -> None:
    others = np.asarray([-1.0, 1.0, NO_VOTE])
    assert floor_of(trusted, others) == pytest.approx(np.quantile([-1.0, 1.0], 0.2))
    assert floor_of(trusted, np.asarray([NO_VOTE])) == NO_FLOOR
    assert math.isnan(NO_VOTE)
