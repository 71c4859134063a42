"""Rows with the mask of a grammar, by the kernel and through torch. Random masks are among `random_draws`."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from gpu_worker.front.draw import Draw
from gpu_worker.front.request.request import SamplingParams
from gpu_worker.native.sampling.sampling import Sampler, with_masks
from gpu_worker.native.sampling.sampling_kernel import load_sampling_kernel
from tests.gpu_worker.engine_driver import compiled
from tests.gpu_worker.random_draws import random_mask
from tests.gpu_worker.slow_sampling import is_allowed


@pytest.fixture(params=["kernel", "torch"])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    return Sampler(compiled(load_sampling_kernel) if request.param == "kernel" else None)


def test_a_mask_allows_ids_of_its_own_row_only(sampler: Sampler) -> None:
    logits = torch.zeros(3, 300)
    logits[:, 7] = 50.0
    allowed = np.zeros(10, np.uint32)
    allowed[1], allowed[9] = 0b101, 1 << 11  # ids 32, 34 and 299
    free = Draw(SamplingParams(), 0, 0)
    greedy = Draw(SamplingParams(temperature=0), 0, 0, allowed=allowed)
    drawn = set()
    for position in range(50):
        masked = Draw(SamplingParams(), 0, position, allowed=allowed)
        tokens, _ = sampler(logits, [free, masked, greedy])
        assert tokens[0] == 7 and tokens[2] == 32
        drawn.add(tokens[1])
    assert drawn == {32, 34, 299}


def test_log_probabilities_are_those_before_the_mask(sampler: Sampler) -> None:
    allowed = np.array([0b10], np.uint32)
    [token], [scored] = sampler(torch.zeros(1, 4), [Draw(SamplingParams(logprobs=2), 0, 0, allowed=allowed)])
    assert token == 1 and scored is not None
    assert scored.logprob == pytest.approx(math.log(0.25)) and [i for i, _ in scored.top] == [0, 1]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_row_that_is_not_finite_stays_so_behind_its_mask(number: float, sampler: Sampler) -> None:
    logits = torch.zeros(1, 300)
    logits[0, 5] = number
    draw = Draw(SamplingParams(logprobs=1), 0, 0, allowed=np.array([0b10] * 10, np.uint32))
    assert sampler(logits, [draw]) == ([None], [None])


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 300, 512])
def test_the_ids_that_a_mask_excludes_become_minus_infinity(vocabulary: int) -> None:
    chance = random.Random(vocabulary)
    logits = torch.arange(3.0)[:, None].repeat(1, vocabulary)
    draws = [Draw(SamplingParams(), 0, 0, allowed=random_mask(chance, vocabulary)) for _ in range(2)]
    draws.insert(1, Draw(SamplingParams(), 0, 0))
    expected = [[row if is_allowed(draws[row], i) else -math.inf for i in range(vocabulary)] for row in range(3)]
    assert with_masks(logits, draws, is_copy=False).tolist() == expected
    assert logits.isfinite().all()
    assert with_masks(logits, draws, is_copy=True) is logits and logits.tolist() == expected


def test_logits_without_masks_are_not_copied() -> None:
    logits = torch.zeros(2, 8)
    assert with_masks(logits, [Draw(SamplingParams(), 0, 0)] * 2, is_copy=False) is logits
