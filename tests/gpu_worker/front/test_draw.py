"""The table of a step's draws, compared with a loop over them, and its random numbers with numpy's generator."""

from __future__ import annotations

import math
import random

import pytest

from gpu_worker.front.draw import GREEDY_BELOW, Draw, make_table, uniforms
from gpu_worker.front.request.request import SamplingParams
from tests.gpu_worker.random_draws import random_draw
from tests.gpu_worker.slow_sampling import uniform_slowly

VOCABULARY = 300
EDGES = [0, 1, 2**32 - 1, 2**32, 2**63 - 1]


def test_the_table_has_the_settings_of_each_draw() -> None:
    chance = random.Random(4)
    draws = [random_draw(chance, VOCABULARY) for _ in range(200)]
    table = make_table(draws, VOCABULARY)
    assert {draw.is_greedy for draw in draws} == {True, False}
    for row, (draw, entry) in enumerate(zip(draws, table, strict=True)):
        params = draw.params
        assert entry["row"] == row
        if draw.is_greedy:
            assert (entry["top_k"], entry["top_p"], entry["log_min_p"]) == (1, 1, -math.inf)
            continue
        assert entry["uniform"] == uniform_slowly(draw.seed, draw.position)
        assert (entry["top_k"], entry["top_p"]) == (min(params.top_k, VOCABULARY), params.top_p)
        assert entry["inverse_temperature"] == pytest.approx(1 / params.temperature, rel=1e-6)
        assert entry["log_min_p"] == pytest.approx(math.log(params.min_p) if params.min_p else -math.inf, rel=1e-6)


def test_a_temperature_below_the_bound_is_greedy() -> None:
    temperatures = [0.0, 1e-45, GREEDY_BELOW / 2, GREEDY_BELOW, 1.0]
    greedy = [Draw(SamplingParams(temperature=each), 0, 0).is_greedy for each in temperatures]
    assert greedy == [True, True, True, False, False]


@pytest.mark.parametrize(
    "draw",
    [
        Draw(SamplingParams(), 0, 0, forbidden=(7,)),
        Draw(SamplingParams(presence_penalty=0.1), 0, 0),
        Draw(SamplingParams(frequency_penalty=-0.1), 0, 0),
        Draw(SamplingParams(repetition_penalty=1.1), 0, 0),
        Draw(SamplingParams(logit_bias=((3, 1.0),)), 0, 0),
    ],
)
def test_only_forbidden_ids_penalties_and_biases_change_the_logits(draw: Draw) -> None:
    others = SamplingParams(temperature=2.0, top_p=0.5, top_k=3, min_p=0.1, logprobs=5)
    assert draw.changes_logits and not Draw(others, 0, 0, tokens=[1, 2], num_prompt_tokens=1).changes_logits


def test_numbers_equal_numpys_generator() -> None:
    chance = random.Random(1)
    seeds = [seed for seed in EDGES for _ in EDGES] + [chance.randrange(2**63) for _ in range(500)]
    positions = EDGES * len(EDGES) + [chance.randrange(2**20) for _ in range(500)]
    expected = [uniform_slowly(seed, position) for seed, position in zip(seeds, positions, strict=True)]
    assert uniforms(seeds, positions).tolist() == expected, "bit by bit: a seed gives the same answer forever"
