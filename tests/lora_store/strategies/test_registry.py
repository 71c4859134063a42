from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from lora_store import ROUTED_STRATEGIES, STRATEGIES, RoutedStrategy, Strategy, strategies
from lora_store.strategies.strategy import CompositionStrategy


def test_every_strategy_file_is_registered() -> None:
    files = {path.stem for path in Path(strategies.__path__[0]).glob("*.py")} - {"__init__", "registry", "strategy"}
    assert files == set(ROUTED_STRATEGIES), "registry.py lists each file's strategy, which has the file's name"


def test_the_names_that_schemas_read_are_those_of_the_registry() -> None:
    assert get_args(Strategy) == tuple(STRATEGIES)
    assert get_args(RoutedStrategy) == ROUTED_STRATEGIES == tuple(name for name in STRATEGIES if name != "base")


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("weights", [[1.0], [0.75, 0.15, 0.1], [1 / 3] * 3, [0.5, 0.2, 0.3]])
def test_final_weights_are_one_for_each_adapter_and_sum_to_one(
    strategy: CompositionStrategy, weights: list[float]
) -> None:
    chosen = strategy.choose(weights, {option.name: option.default for option in strategy.options})
    assert len(chosen) == len(weights) and sum(chosen) == pytest.approx(1)
    assert min(chosen) >= 0
