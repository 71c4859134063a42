"""Random numbers for all rows at once, compared with numpy's generator."""

from __future__ import annotations

import random

from gpu_worker.front.philox import uniforms
from tests.gpu_worker.slow_sampling import uniform_slowly

EDGES = [0, 1, 2**32 - 1, 2**32, 2**63 - 1]


def test_numbers_equal_numpys_generator() -> None:
    chance = random.Random(1)
    seeds = [seed for seed in EDGES for _ in EDGES] + [chance.randrange(2**63) for _ in range(500)]
    positions = EDGES * len(EDGES) + [chance.randrange(2**20) for _ in range(500)]
    expected = [uniform_slowly(seed, position) for seed, position in zip(seeds, positions, strict=True)]
    assert uniforms(seeds, positions).tolist() == expected, "bit by bit: a seed gives the same answer forever"
