from __future__ import annotations

import pytest

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
def test_the_heaviest_are_kept_up_to_the_option(
    weights: list[float], kept_weight: float, expected: list[float]
) -> None:
    assert choose(weights, kept_weight) == pytest.approx(expected)
