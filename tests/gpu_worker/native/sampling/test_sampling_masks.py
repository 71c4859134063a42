"""Rows with the mask of a grammar, by the kernel and through torch. Random masks are among `random_draws`."""

from __future__ import annotations

import math
import random

import pytest
import torch

from gpu_worker.front.draw import Draw
from gpu_worker.front.request.request import SamplingParams
from gpu_worker.native.sampling.sampling import with_masks
from tests.gpu_worker.random_draws import random_mask
from tests.gpu_worker.slow_sampling import is_allowed


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
