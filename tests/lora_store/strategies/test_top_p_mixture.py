from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_store.strategies.top_p_mixture import TOP_P_MIXTURE


def choose(weights: list[float], kept_weight: float) -> list[float]:
    return list(TOP_P_MIXTURE.choose(weights, {"kept_weight": kept_weight}))


@pytest.mark.parametrize(
    ("weights", "kept_weight", "expected"),
    [
        ([0.5, 0.3, 0.2], 0.9, [0.5, 0.3, 0.2]),
        ([0.5, 0.3, 0.2], 0.8, [0.625, 0.375, 0.0]),
        ([0.5, 0.3, 0.2], 0.81, [0.5, 0.3, 0.2]),
        ([0.5, 0.3, 0.2], 0.01, [1.0, 0.0, 0.0]),
        ([0.5, 0.1, 0.4], 0.9, [5 / 9, 0.0, 4 / 9]),
        ([0.5, 0.5], 0.5, [1.0, 0.0]),
        ([0.7, 0.1, 0.1, 0.1], 0.9, [7 / 9, 1 / 9, 1 / 9, 0.0]),  # the sum of the first three is rounded down
        ([0.8, 0.0, 0.2], 1.0, [0.8, 0.0, 0.2]),
        ([1.0], 0.9, [1.0]),
    ],
)
def test_the_heaviest_are_kept_until_their_weights_reach_the_option(
    weights: list[float], kept_weight: float, expected: list[float]
) -> None:
    assert choose(weights, kept_weight) == pytest.approx(expected)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=6), st.floats(0.01, 1.0))
def test_as_few_are_kept_as_any_subset_needs(parts: list[int], kept_weight: float) -> None:
    weights = [part / sum(parts) for part in parts]
    chosen = choose(weights, kept_weight)
    subsets = (subset for size in range(1, 7) for subset in combinations(weights, size))
    fewest = next(len(subset) for subset in subsets if sum(subset) >= kept_weight - 1e-9)
    assert (sum(weight > 0 for weight in chosen), sum(chosen)) == (fewest, pytest.approx(1))
    dropped = [given for given, final in zip(weights, chosen, strict=True) if not final]
    assert max(dropped, default=0) <= min(given for given, final in zip(weights, chosen, strict=True) if final)
