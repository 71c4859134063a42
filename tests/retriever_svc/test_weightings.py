from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retriever_svc.index import Match
from retriever_svc.weightings import MIN_LEAD, WEIGHTINGS, limited_weights
from tests.retriever_svc.pool_fakes import record_of

Case = tuple[list[float], list[bool]]
WEIGHT = st.floats(1e-6, 1.0)
CASES = st.lists(st.tuples(WEIGHT, st.booleans()), min_size=1, max_size=16).map(
    lambda pairs: ([w for w, _ in pairs], [shares for _, shares in pairs])
)


def slow_limited(weights: list[float], shares_lead: list[bool]) -> list[float]:
    """Shrink the companions by tiny steps until the best adapter has three times their weight, then keep the sum."""
    current = list(weights)
    companions = [place for place in range(1, len(weights)) if not shares_lead[place]]
    while companions and current[0] < MIN_LEAD * sum(current[place] for place in companions):
        for place in companions:
            current[place] *= 0.9999
    return [w * sum(weights) / sum(current) for w in current]


@pytest.mark.parametrize(
    ("weights", "shares_lead", "expected"),
    [
        ([1.0], [True], [1.0]),
        ([1 / 3, 1 / 3, 1 / 3], [True, False, False], [3 / 4, 1 / 8, 1 / 8]),
        ([1 / 3, 1 / 3, 1 / 3], [True, True, True], [1 / 3, 1 / 3, 1 / 3]),
        ([1 / 3, 1 / 3, 1 / 3], [True, True, False], [3 / 7, 3 / 7, 1 / 7]),
        ([0.9, 0.1], [True, False], [0.9, 0.1]),
    ],
)
def test_companions_together_get_a_third_of_the_best_adapters_weight(
    weights: list[float], shares_lead: list[bool], expected: list[float]
) -> None:
    assert limited_weights(weights, shares_lead) == pytest.approx(expected)


@given(CASES)
def test_the_formula_equals_a_slow_search_for_the_limit(case: Case) -> None:
    weights, shares_lead = case
    bounded = [max(w, 0.01) for w in weights]  # the slow loop takes small steps
    assert limited_weights(bounded, shares_lead) == pytest.approx(slow_limited(bounded, shares_lead), rel=1e-3)


@given(CASES)
def test_the_sum_is_kept_and_the_lead_is_held(case: Case) -> None:
    weights, shares_lead = case
    limited = limited_weights(weights, shares_lead)
    companions = sum(w for w, shares in zip(limited[1:], shares_lead[1:], strict=True) if not shares)
    assert math.isclose(sum(limited), sum(weights), rel_tol=1e-9)
    assert limited[0] >= MIN_LEAD * companions * (1 - 1e-9)
    assert all(w > 0 for w in limited)


def weigh(weighting: str, *scores: float) -> list[float]:
    matches = [Match(record_of(f"n{n}", None), score) for n, score in enumerate(scores)]
    return WEIGHTINGS[weighting].weigh(matches, "local", 0.1)


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [("uniform", [1 / 3] * 3), ("softmax", [0.665, 0.245, 0.090]), ("evidence", [0.75, 0.183, 0.067])],
)
def test_each_weighting_has_its_own_weights(weighting: str, expected: list[float]) -> None:
    """Scores at steps of the temperature; in `softmax` the companions have half of the best adapter's weight."""
    assert weigh(weighting, 0.8, 0.7, 0.6) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(("share", "is_kept"), [(0.021, True), (0.019, False)])
def test_evidence_leaves_out_companions_of_less_than_a_fiftieth(share: float, is_kept: bool) -> None:
    """The share is that of the best adapter's weight. The adapter before and the one after it are not affected."""
    low = 0.8 + 0.1 * math.log(share)
    weights = weigh("evidence", 0.8, low, 0.8)
    assert [weight > 0 for weight in weights] == [True, is_kept, True]
    assert sum(weights) == pytest.approx(1)
    assert min(weigh("softmax", 0.8, low, 0.8)) > 0
