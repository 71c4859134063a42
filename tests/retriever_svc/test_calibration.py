from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from retriever_svc.calibration import MARGINS, NO_THRESHOLD, Abstain, Candidates, Judgement, judge, leave_one_out_scores

POINTS: tuple[Abstain, ...] = ("lenient", "balanced", "strict")
NONE = np.empty(0, np.float32)


def judged(
    scores: Sequence[float],
    own: Sequence[np.ndarray] = (),
    point: Abstain = "balanced",
    near: float = 0.5,
    own_near: Sequence[float] = (),
    near_words: Sequence[float] = (),
) -> Judgement:
    """Judge candidates, by default without samples and far from ordinary prompts."""
    nearness, words = (np.asarray(given or [0.0] * len(scores)) for given in (own_near, near_words))
    return judge(Candidates(np.asarray(scores, float), own or [NONE] * len(scores), nearness, words), point, near)


def slow_judgement(
    scores: Sequence[float],
    own: Sequence[Sequence[float]],
    point: Abstain,
    near: float,
    own_near: Sequence[float],
    near_words: Sequence[float],
) -> list[tuple[float, float]]:
    """The formulas of the module's docstring, one candidate at a time."""
    found = []
    for place, score in enumerate(scores):
        grown = max((own_near[place] - 0.65) / 0.11, (near_words[place] - 0.82) / 0.08)
        handicap = 0.2 * min(1.0, max(0.0, grown))
        others = [other for number, other in enumerate(scores) if number != place]
        lead = max(-0.3, min(0.3, score - max(others))) if others else 0.3
        margin = min(score - near - handicap, -0.15)
        confidence = 1 / (1 + math.exp(-(2.18 + 20.4 * margin + 18.4 * lead)))
        floor = 0.3 * sum(own[place]) / len(own[place]) if len(own[place]) else -1.0
        relief = 0.0 if len(own[place]) else 0.02
        found.append((max(near + MARGINS[point] + handicap - relief, floor), confidence))
    return found


def test_leave_one_out_equals_a_slow_loop() -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((9, 4))
    for others in (rows, rng.standard_normal((9, 4))):  # the means may be of other rows
        for left_out, score in enumerate(leave_one_out_scores(rows, None if others is rows else others)):
            mean = np.mean([row for number, row in enumerate(others) if number != left_out], axis=0)
            expected = rows[left_out] @ mean / np.linalg.norm(rows[left_out]) / np.linalg.norm(mean)
            assert score == pytest.approx(expected, abs=1e-6)
    assert len(leave_one_out_scores(rows[:1])) == len(leave_one_out_scores(rows[:0])) == 0
    assert leave_one_out_scores(np.asarray([[0.0, 1], [1, 0], [-1, 0]]))[0] == 0, "others that cancel out"


@pytest.mark.parametrize("point", POINTS)
def test_candidates_are_judged_as_the_slow_formula_says(point: Abstain) -> None:
    rng = np.random.default_rng(3)
    for count in (1, 2, 3, 7):
        scores, near, own_near = rng.uniform(-0.2, 0.9, count), float(rng.uniform(0, 0.8)), rng.uniform(0.4, 0.8, count)
        own = [rng.uniform(0.2, 0.9, size).astype(np.float32) for size in rng.integers(0, 9, count)]
        nearness = own_near.tolist(), rng.uniform(0.7, 1, count).tolist()
        found = judged(scores.tolist(), own, point, near, *nearness)
        expected = slow_judgement(scores.tolist(), [o.tolist() for o in own], point, near, *nearness)
        np.testing.assert_allclose(found.thresholds, [threshold for threshold, _ in expected], atol=1e-6)
        np.testing.assert_allclose(found.confidences, [confidence for _, confidence in expected], atol=1e-6)


def test_never_turns_nothing_away_and_keeps_the_confidence() -> None:
    assert sorted(MARGINS, key=MARGINS.__getitem__) == ["never", *POINTS]
    never, usual = (judged([-0.9, 0.3], point=point) for point in ("never", "balanced"))
    assert never.thresholds.tolist() == [NO_THRESHOLD, NO_THRESHOLD]
    assert never.confidences.tolist() == usual.confidences.tolist()
