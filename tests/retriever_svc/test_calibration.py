from __future__ import annotations

import math

import numpy as np
import pytest

from retriever_svc.calibration import (
    MIN_SCORES,
    NO_THRESHOLD,
    SHARES,
    Adapters,
    Calibration,
    Nearness,
    leave_one_out_scores,
)
from retriever_svc.encoder import unit_rows

DIM = 16


def group(rng: np.random.Generator, size: int, noise: float) -> np.ndarray:
    """Return samples around a centre that shares a direction with all others."""
    centre = unit_rows(rng.standard_normal(DIM) + 2 * np.eye(DIM)[0])
    return unit_rows(centre + noise * rng.standard_normal((size, DIM)) / DIM**0.5)


def adapters_of(groups: list[np.ndarray]) -> Adapters:
    vectors = np.stack([unit_rows(rows.mean(axis=0)) for rows in groups])
    return Adapters(vectors, [leave_one_out_scores(rows) for rows in groups])


def ordinary_rows(rng: np.random.Generator) -> np.ndarray:
    return unit_rows(rng.standard_normal((80, DIM)) + 2 * np.eye(DIM)[0])


def pool(
    seed: int = 0, num_adapters: int = 40, num_samples: int = 20, widest: float = 1.0
) -> tuple[Adapters, np.ndarray]:
    rng = np.random.default_rng(seed)
    groups = [group(rng, num_samples, rng.uniform(0.3, widest)) for _ in range(num_adapters)]
    return adapters_of(groups), ordinary_rows(rng)


def slow_fit(adapters: Adapters, ordinary: np.ndarray, number: int, score: float) -> float:
    """The formula of the module's docstring for one score, with its shrinkage, one adapter at a time."""
    own = [np.asarray(scores, float) for scores in adapters.own_scores]
    usual = math.sqrt(np.median([scores.var(ddof=1) for scores in own if len(scores) >= MIN_SCORES]))
    scores, count = own[number], len(own[number])
    mean = scores.mean() if count else 0.0
    if count < MIN_SCORES:
        full = [s for s in own if len(s) >= MIN_SCORES]
        m, others = np.median([s.mean() for s in full]), np.median([*map(len, full)]) - 1
        low, high = 0.0, 1.0
        for _ in range(80):  # the pairwise cosine of samples, by bisection
            pair = (low + high) / 2
            low, high = (pair, high) if pair / math.sqrt(pair + (1 - pair) / others) < m else (low, pair)
        expected = low / math.sqrt(low + (1 - low) / max(count, 1))
        mean = (scores.sum() + (MIN_SCORES - count) * expected) / MIN_SCORES
    squares = float(((scores - scores.mean()) ** 2).sum()) if count else 0.0
    variance = (squares + 5 * usual**2) / (max(count - 1, 0) + 5)
    against = [float(adapters.vectors[number] @ row) for row in ordinary]
    distance = (score - np.mean(against)) / np.std(against)
    return (score - mean) / math.sqrt(variance) + 0.5 * distance


def floors_of(adapters: Adapters, ordinary: np.ndarray) -> np.ndarray:
    against = adapters.vectors @ ordinary.T
    return against.mean(axis=1) + 1.64 * against.std(axis=1)


def test_leave_one_out_equals_a_slow_loop() -> None:
    rows = np.random.default_rng(1).standard_normal((9, 4))
    for left_out, score in enumerate(leave_one_out_scores(rows)):
        mean = np.mean([row for number, row in enumerate(rows) if number != left_out], axis=0)
        expected = rows[left_out] @ mean / np.linalg.norm(rows[left_out]) / np.linalg.norm(mean)
        assert score == pytest.approx(expected, abs=1e-6)
    assert len(leave_one_out_scores(rows[:1])) == len(leave_one_out_scores(rows[:0])) == 0


def test_others_that_cancel_out_score_zero() -> None:
    np.testing.assert_array_equal(leave_one_out_scores(np.asarray([[1, 0], [0, 1], [0, -1]]))[0], 0)


def test_the_confidence_is_the_share_of_own_samples_that_fit_less_well() -> None:
    adapters, ordinary = pool()
    calibration = Calibration.of(adapters, ordinary)
    fits = [slow_fit(adapters, ordinary, i, s) for i, own in enumerate(adapters.own_scores) for s in own]
    for number in (0, 7, 39):
        one = Adapters(adapters.vectors[[number]], [adapters.own_scores[number]])
        for score in np.quantile(adapters.own_scores[number], [0.1, 0.5, 0.9]):
            _, [confidence] = calibration.judge(one, np.asarray([score]), 0.03)
            fit = slow_fit(adapters, ordinary, number, score)
            assert confidence == pytest.approx(np.mean([other < fit for other in fits]), abs=2 / len(fits))


@pytest.mark.parametrize("num_samples", [1, 2, 4])
def test_few_samples_are_judged_as_the_slow_formula_says(num_samples: int) -> None:
    full, ordinary = pool(num_adapters=10)
    small, _ = pool(seed=1, num_adapters=10, num_samples=num_samples)
    both = Adapters(np.concatenate([full.vectors, small.vectors]), [*full.own_scores, *small.own_scores])
    calibration = Calibration.of(both, ordinary)
    fits = [slow_fit(both, ordinary, i, s) for i, own in enumerate(full.own_scores) for s in own]
    scores = np.full(10, 0.7)
    _, confidences = calibration.judge(small, scores, 0.03)
    expected = [np.mean([fit < slow_fit(both, ordinary, 10 + n, 0.7) for fit in fits]) for n in range(10)]
    np.testing.assert_allclose(confidences, expected, atol=2 / len(fits) + 1e-9)


@pytest.mark.parametrize("share", [share for share in SHARES.values() if share])
def test_a_threshold_is_the_score_at_which_the_confidence_reaches_the_share(share: float) -> None:
    adapters, ordinary = pool()
    calibration = Calibration.of(adapters, ordinary)
    thresholds, _ = calibration.judge(adapters, np.zeros(40), share)
    assert len(np.unique(thresholds.round(3))) > 30  # each adapter has its own
    _, confidences = calibration.judge(adapters, thresholds, share)
    floors = floors_of(adapters, ordinary)
    assert (thresholds >= floors - 1e-9).all()
    raised = thresholds <= floors + 1e-9
    np.testing.assert_allclose(confidences[~raised], share, atol=1e-6)
    assert (confidences[raised] >= share).all()
    assert raised.mean() < 0.5
    _, below = calibration.judge(adapters, thresholds - 1e-3, share)
    assert (below < share).all()


@pytest.mark.parametrize("share", SHARES.values())
def test_an_operating_point_turns_away_its_share_of_own_samples(share: float) -> None:
    adapters, ordinary = pool(num_adapters=100, widest=0.6)
    thresholds, _ = Calibration.of(adapters, ordinary).judge(adapters, np.zeros(100), share)
    assert share == 0 or (thresholds > floors_of(adapters, ordinary)).mean() > 0.98
    turned_away = [np.mean(own < t) for own, t in zip(adapters.own_scores, thresholds, strict=True)]
    assert np.mean(turned_away) == pytest.approx(share, abs=0.003)


def test_a_prompt_nearer_to_ordinary_prompts_than_to_the_adapter_fits_less() -> None:
    adapters, ordinary = pool()
    calibration, scores = Calibration.of(adapters, ordinary), np.linspace(0.2, 0.9, 40)
    fits = [slow_fit(adapters, ordinary, i, s) for i, own in enumerate(adapters.own_scores) for s in own]
    nearness = np.random.default_rng(5).uniform(0, 1, 40)
    _, confidences = calibration.judge(adapters, scores, 0.03, Nearness(nearness, 0.1))
    for number, (score, near) in enumerate(zip(scores, nearness, strict=True)):
        against = ordinary @ adapters.vectors[number]
        fit = slow_fit(adapters, ordinary, number, score) - max(0, 1.2 * (near - score) / 0.1)
        share = np.mean([other < fit for other in fits]) if score >= against.mean() + 1.64 * against.std() else 0
        assert confidences[number] == pytest.approx(share, abs=1.5 / len(fits))


def test_a_threshold_is_the_score_of_the_wanted_confidence_for_ordinary_prompts_too() -> None:
    adapters, ordinary = pool()
    calibration, nearness = Calibration.of(adapters, ordinary), Nearness(np.linspace(0, 1, 40), 0.1)
    plain, _ = calibration.judge(adapters, np.zeros(40), 0.08)
    thresholds, _ = calibration.judge(adapters, np.zeros(40), 0.08, nearness)
    _, confidences = calibration.judge(adapters, thresholds, 0.08, nearness)
    reached = thresholds < 1
    np.testing.assert_allclose(confidences[reached], 0.08, atol=1e-9)
    np.testing.assert_array_equal(thresholds > plain, (nearness.values > plain) & (plain < 1))
    assert (thresholds > plain).any() and (thresholds == plain).any()


def test_ordinary_prompts_near_an_adapter_raise_its_threshold() -> None:
    adapters, ordinary = pool()
    near = unit_rows(ordinary + 0.5 * adapters.vectors[:1])
    before, _ = Calibration.of(adapters, ordinary).judge(adapters, np.zeros(40), 0.03)
    after, _ = Calibration.of(adapters, near).judge(adapters, np.zeros(40), 0.03)
    assert after[0] - before[0] > 1.5 * np.median(after[1:] - before[1:])


def test_no_adapter_fits_what_one_ordinary_prompt_in_twenty_reaches() -> None:
    """Its samples may be as various as ordinary prompts, few, or the ordinary prompts themselves."""
    adapters, ordinary = pool()
    rng = np.random.default_rng(8)
    calibration = Calibration.of(adapters, ordinary)
    unseen = unit_rows(rng.standard_normal((2000, DIM)) + 2 * np.eye(DIM)[0])
    groups = [ordinary, ordinary[:20], ordinary[20:22], ordinary[30:31], unseen[:20], group(rng, 20, 4.0)]
    attackers = adapters_of(groups)
    for share in (0.01, 0.03, 0.08):
        thresholds, _ = calibration.judge(attackers, np.zeros(len(groups)), share)
        accepted = (attackers.vectors @ unseen.T >= thresholds[:, np.newaxis]).mean(axis=1)
        assert (accepted < 0.1).all(), accepted
    floors = floors_of(attackers, ordinary)
    _, confidences = calibration.judge(attackers, floors - 1e-6, 0.01)
    assert confidences.tolist() == [0.0] * len(groups)


def test_each_adapter_counts_once_however_many_samples_it_has() -> None:
    rng = np.random.default_rng(3)
    groups = [group(rng, 20, noise) for noise in np.linspace(0.3, 1, 12)]
    odd, ordinary = group(rng, 20, 3.0), ordinary_rows(rng)
    honest = adapters_of(groups)
    short = Calibration.of(adapters_of([*groups, odd]), ordinary)
    long = Calibration.of(adapters_of([*groups, np.tile(odd, (10, 1))]), ordinary)
    few, many = (calibration.judge(honest, np.zeros(12), 0.03)[0] for calibration in (short, long))
    np.testing.assert_allclose(many, few, atol=0.05)


@pytest.mark.parametrize("num_samples", [1, 2, 3, MIN_SCORES - 1])
def test_an_adapter_of_few_samples_borrows_from_the_pool_and_says_nothing_about_it(num_samples: int) -> None:
    rng = np.random.default_rng(4)
    groups = [group(rng, 20, 0.6) for _ in range(12)]
    ordinary, small = ordinary_rows(rng), [group(rng, num_samples, 0.6) for _ in range(30)]
    pooled = Calibration.of(adapters_of([*groups, *small]), ordinary)
    alone = Calibration.of(adapters_of(groups), ordinary)
    few = adapters_of(small)
    thresholds, _ = pooled.judge(few, np.zeros(30), 0.03)
    np.testing.assert_array_equal(thresholds, alone.judge(few, np.zeros(30), 0.03)[0])
    full, _ = alone.judge(adapters_of(groups), np.zeros(12), 0.03)
    assert thresholds.mean() < full.mean()  # a mean of few samples is farther from its task's prompts


def test_without_any_adapter_of_enough_samples_the_usual_distribution_applies() -> None:
    adapters, ordinary = pool(num_samples=MIN_SCORES - 1)
    thresholds, confidences = Calibration.of(adapters, ordinary).judge(adapters, np.ones(40), 0.03)
    against = adapters.vectors @ ordinary.T
    assert (thresholds > against.mean(axis=1)).all()
    assert (thresholds < 1).all()
    assert (confidences > 0.03).all()


def test_without_samples_and_ordinary_prompts_there_are_no_thresholds() -> None:
    adapters, _ = pool(num_samples=1)
    thresholds, confidences = Calibration.of(adapters).judge(adapters, np.zeros(40), 0.08)
    assert thresholds.tolist() == [NO_THRESHOLD] * 40
    assert confidences.tolist() == [1.0] * 40


@pytest.mark.parametrize("with_ordinary", [False, True])
def test_equal_samples_have_a_threshold_below_their_score(with_ordinary: bool) -> None:
    rng = np.random.default_rng(5)
    same = adapters_of([np.tile(group(rng, 1, 0.5), (20, 1))])
    calibration = Calibration.of(same, ordinary_rows(rng) if with_ordinary else None)
    [threshold], [confidence] = calibration.judge(same, np.ones(1), 0.08)
    assert -1 <= threshold <= 1
    assert math.isfinite(threshold)
    assert confidence >= 0.08
