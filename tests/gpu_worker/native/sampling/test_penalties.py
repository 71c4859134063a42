"""Penalties and bias, compared with a slow loop over the vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu_worker.front.draw import Draw
from gpu_worker.front.request.request import SamplingParams
from gpu_worker.native.sampling.penalties import adjust
from tests.gpu_worker.slow_sampling import adjusted_slowly

PROMPT, MADE = [3, 3, 5, 7], [1, 3, 1, 1]
KINDS = [
    SamplingParams(presence_penalty=0.7),
    SamplingParams(frequency_penalty=-0.4),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(repetition_penalty=0.5),
    SamplingParams(logit_bias=((2, 5.0), (7, -100.0))),
    SamplingParams(presence_penalty=1.5, frequency_penalty=0.3, repetition_penalty=1.1, logit_bias=((1, 4.0),)),
]


def logits_of(seed: int, size: int = 12) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("made", [MADE, []], ids=["answer", "first token"])
def test_logits_of_all_rows_equal_the_slow_loop(made: list[int]) -> None:
    draws = [Draw(params, 0, 0, (), PROMPT + made, len(PROMPT)) for params in (SamplingParams(), *KINDS)]
    draws.append(Draw(KINDS[-1], 0, 0, (3, 11), PROMPT + made, len(PROMPT)))
    logits = torch.stack([logits_of(seed) for seed in range(len(draws))])
    found = logits.clone()
    adjust(found, draws)
    assert found.tolist() == [adjusted_slowly(row, draw) for row, draw in zip(logits, draws, strict=True)]
    assert torch.equal(found[0], logits[0]), "a row without options does not change"
