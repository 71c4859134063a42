from __future__ import annotations

import pytest

from lora_store.strategies.strategy import CompositionStrategy, StrategyOption

WIDE = CompositionStrategy(
    name="wide",
    summary="",
    adds="",
    options=(StrategyOption("width", "How wide.", 0.5, 0.0, 2.0), StrategyOption("depth", "How deep.", 1.0, 0.0, 9.0)),
)


def test_a_given_value_is_before_the_settings_and_those_before_the_options_own() -> None:
    assert WIDE.read_options({}, {}) == {"width": 0.5, "depth": 1.0}
    assert WIDE.read_options({"width": 2.0}, {"width": 0.7, "depth": 3.0}) == {"width": 2.0, "depth": 3.0}
    assert WIDE.read_options({}, {"height": 7.0}) == {"width": 0.5, "depth": 1.0}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"height": 1.0}, "strategy 'wide' has no option 'height'; it has width, depth"),
        ({"width": 0.0}, "width must be above 0 and at most 2, got 0"),
        ({"width": 2.1}, "width must be above 0 and at most 2, got 2.1"),
        ({"width": float("nan")}, "width must be above 0 and at most 2, got nan"),
    ],
)
def test_an_unknown_option_and_a_value_out_of_bounds_are_refused(given: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        WIDE.read_options(given, {})
    assert str(caught.value) == said
