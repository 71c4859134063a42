"""Penalties and bias against a slow loop over the vocabulary."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from gpu_worker.penalties import adjust
from gpu_worker.request import SamplingParams
from gpu_worker.sampling import Draw, sample

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


def adjusted_slowly(logits: Tensor, params: SamplingParams, prompt: list[int], made: list[int]) -> list[float]:
    bias, counts = dict(params.logit_bias), Counter(made)
    values = []
    for i, value in enumerate(logits.tolist()):
        value += bias.get(i, 0.0)
        if i in prompt or i in made:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= counts[i] * params.frequency_penalty
        value -= params.presence_penalty if counts[i] else 0.0
        values.append(value)
    return values


@pytest.mark.parametrize("params", KINDS, ids=str)
@pytest.mark.parametrize("made", [MADE, []], ids=["answer", "first token"])
def test_logits_are_changed_as_the_slow_loop_says(params: SamplingParams, made: list[int]) -> None:
    logits = logits_of(1)
    found = logits.clone()
    adjust(found, params, PROMPT + made, len(PROMPT))
    assert found.tolist() == pytest.approx(adjusted_slowly(logits, params, PROMPT, made), abs=1e-5)


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_row_is_adjusted_the_same_whoever_is_beside_it(temperature: float) -> None:
    batch = torch.stack([logits_of(seed) for seed in range(len(KINDS) + 1)])
    asked = [SamplingParams(temperature=temperature), *[changed(kind, temperature=temperature) for kind in KINDS]]
    draws = [Draw(params, 3, 8, (), PROMPT + MADE, len(PROMPT)) for params in asked]
    before = batch.clone()
    together = sample(batch, draws)
    assert torch.equal(batch, before), "the model's own logits are what log probabilities are told of"
    assert together == [sample(row[None], [draw])[0] for row, draw in zip(batch, draws, strict=True)]


def changed(params: SamplingParams, **changes: object) -> SamplingParams:
    return SamplingParams(**{name: getattr(params, name) for name in params.__slots__} | changes)  # type: ignore[arg-type]


def test_greedy_takes_what_is_largest_after_penalties() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.9, 1.0]], dtype=torch.bfloat16)
    plain = SamplingParams(temperature=0)
    penal = SamplingParams(temperature=0, presence_penalty=0.2)
    biased = SamplingParams(temperature=0, logit_bias=((3, 100.0),))
    draws = [Draw(params, 0, 3, (), [0, 1], 1) for params in (plain, penal, biased)]
    assert sample(logits.expand(3, -1), draws) == [1, 2, 3]


def test_what_may_not_come_yet_does_not_come_by_a_bias() -> None:
    params = SamplingParams(temperature=0, logit_bias=((1, 100.0),))
    assert sample(torch.zeros(1, 3), [Draw(params, 0, 0, forbidden=(1,))]) != [1]
