"""The paper's way to compute mixtures gives the engine's answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.literal_einsum import literal_mixture
from gpu_worker.native.loop import Engine
from lora_store.adapter import AdapterWeights
from tests.gpu_worker.engine_driver import by_digest, greedy, run_together
from tests.tiny import plan_of, random_adapter

Shapes = dict[str, tuple[int, int]]


@pytest.fixture
def pool(shapes: Shapes) -> list[AdapterWeights]:
    return [random_adapter(shapes, seed, rank=2) for seed in range(3)]


def test_the_literal_mixture_is_the_engines(make_engine: Callable[..., Engine], pool: list[AdapterWeights]) -> None:
    """Only rows with adapters are in the batch: the paper's way applies every adapter to every token."""
    plans = [plan_of("mixture", (pool[0], 0.5), (pool[1], 0.5)), plan_of("selection", (pool[2], 1.0))]
    jobs = [greedy("the cat", plan, request_id=f"{number}", num_new=4) for number, plan in enumerate(plans)]
    expected = [answer.tokens for answer in run_together(make_engine(by_digest(*pool)), jobs)]
    engine = make_engine(by_digest(*pool))
    composes = engine._forward.compose
    with literal_mixture(engine):
        assert [answer.tokens for answer in run_together(engine, jobs)] == expected
    assert engine._forward.compose is composes
