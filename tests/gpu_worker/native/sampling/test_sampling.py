"""Tokens chosen for a whole batch, by the kernel and by torch, compared with a slow loop over the vocabulary."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from gpu_worker.front.draw import Draw
from gpu_worker.front.request.request import SamplingParams
from gpu_worker.native.sampling.sampling import Sampler, with_masks
from gpu_worker.native.sampling.sampling_kernel import SamplingKernel
from tests.gpu_worker.engine_driver import compiled
from tests.gpu_worker.random_draws import UNSOUND, random_batch, random_mask
from tests.gpu_worker.slow_sampling import is_allowed, kept_slowly, scored_slowly, tokens_slowly
from tests.soak import Scale

DTYPES = [torch.float32, torch.bfloat16]
VOCABULARIES = [1, 7, 300, 512, 2048, 4099, 6000]


def logits_of(seed: int, vocabulary: int = 50, size: float = 2.0) -> Tensor:
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * size


def tokens_of(sampler: Sampler, logits: Tensor, draws: list[Draw]) -> list[int | None]:
    return sampler(logits, draws)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_random_batch_equals_the_slow_loop(sampler: Sampler, dtype: torch.dtype, scale: Scale) -> None:
    """Settings and rows are random. Ids may differ only if a bound is met within 1e-6 of the mass."""
    chance = random.Random(f"{dtype}")
    num_sampled, num_ambiguous = 0, 0
    for number in range(scale.pick("batches", small=40, full=1000)):
        vocabulary = VOCABULARIES[number % len(VOCABULARIES)]
        logits, draws = random_batch(chance, 1 + number % 9, vocabulary)
        logits = logits.to(dtype)
        before = logits.clone()
        tokens, scores = sampler(logits, draws)
        assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0)), "logits do not change"
        assert sampler(logits, draws) == (tokens, scores), "nothing is kept between calls"
        for row, draw, token, scored in zip(logits, draws, tokens, scores, strict=True):
            expected = tokens_slowly(row, draw)
            assert token in expected, draw
            num_sampled += 1
            num_ambiguous += len(expected) > 1
            assert (scored is None) == (token is None or draw.params.logprobs is None)
            if scored is not None and token is not None:
                logprob, top = scored_slowly(row, token, draw.params.logprobs or 0)
                assert scored.logprob == pytest.approx(logprob, rel=1e-5, abs=1e-5)
                assert [i for i, _ in scored.top] == [i for i, _ in top]
                assert [own for _, own in scored.top] == pytest.approx([own for _, own in top], rel=1e-5, abs=1e-5)
    assert num_ambiguous < 0.05 * num_sampled, "the tolerance must not hide the comparison"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(min_p=0.02),
        SamplingParams(top_k=50, top_p=0.95),
        SamplingParams(top_p=0.95),
        SamplingParams(top_k=5000, top_p=0.9),
        SamplingParams(top_p=0.9, temperature=1.5),
    ],
    ids=str,
)
def test_a_large_vocabulary_equals_the_slow_loop(params: SamplingParams, dtype: torch.dtype, scale: Scale) -> None:
    vocabulary, num_rows = scale.pick("ids", small=3 << 15, full=1 << 18), scale.pick("rows", small=1, full=10)
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(num_rows, vocabulary, generator=generator) * 4
    logits[:, :: vocabulary // 260] += 12  # a head of a few hundred ids, as after a real prompt
    logits = logits.to(dtype)
    draws = [Draw(params, 5, position) for position in range(num_rows)]
    allowed = [tokens_slowly(row, draw) for row, draw in zip(logits, draws, strict=True)]
    for sampler in (Sampler(compiled(SamplingKernel.load)), Sampler()):
        for token, ids in zip(tokens_of(sampler, logits, draws), allowed, strict=True):
            assert token in ids


@pytest.mark.parametrize(
    ("params", "vocabulary", "size"),
    [
        (SamplingParams(), 50, 2.0),
        (SamplingParams(top_k=10_000, top_p=0.5), 50, 2.0),
        (SamplingParams(top_p=0.9), 20_000, 0.1),  # nearly flat: about 18,000 ids
        (SamplingParams(top_k=1500, top_p=0.95), 3000, 0.1),
        (SamplingParams(min_p=0.05, top_p=0.7, top_k=12, temperature=1.5), 50, 2.0),
    ],
    ids=str,
)
def test_ids_are_drawn_as_often_as_their_probability(
    params: SamplingParams, vocabulary: int, size: float, sampler: Sampler
) -> None:
    logits, count = logits_of(1, vocabulary, size), 2000 if vocabulary == 50 else 300
    values = logits.double()
    ranked = sorted(range(vocabulary), key=lambda i: -float(values[i]))
    masses = ((values - values.max()) / params.temperature).exp().tolist()
    kept = kept_slowly(ranked, masses, params)
    total = math.fsum(masses[i] for i in kept)
    drawn: list[int | None] = []
    for start in range(0, count, 100):
        draws = [Draw(params, 3, position) for position in range(start, start + 100)]
        drawn += tokens_of(sampler, logits.expand(100, -1).contiguous(), draws)
    assert set(drawn) <= set(kept)
    for i in kept[:20]:
        share = masses[i] / total
        assert drawn.count(i) == pytest.approx(count * share, abs=5 * math.sqrt(count * share) + 1)


def test_a_batch_without_rows_has_no_tokens(sampler: Sampler) -> None:
    for vocabulary in (300, 512):
        assert sampler(torch.zeros(0, vocabulary), []) == ([], [])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_greedy_and_sampled_rows_share_a_batch(dtype: torch.dtype, sampler: Sampler) -> None:
    logits = torch.stack([logits_of(seed, size=20.0) for seed in range(30)]).to(dtype)
    logits[range(30), range(10, 40)] = 300.0
    kinds = [SamplingParams(temperature=0), SamplingParams(top_k=1, temperature=5.0), SamplingParams()]
    assert tokens_of(sampler, logits, [Draw(kinds[i % 3], 5, i) for i in range(30)]) == list(range(10, 40))


def test_huge_equal_logits_share_their_probability(sampler: Sampler) -> None:
    logits = torch.tensor([[3e30, 2e30, 3e30]])
    draw = Draw(SamplingParams(logprobs=2), 1, 1)
    [token], [scored] = sampler(logits, [draw])
    assert token is not None and scored is not None
    half = pytest.approx(math.log(0.5))
    assert (scored.logprob, scored.top) == (half, ((0, half), (2, half)))
    assert scored_slowly(logits[0], token, 2) == (half, [(0, half), (2, half)])


@pytest.mark.parametrize("break_row", UNSOUND, ids=["nan", "negative nan", "inf", "nothing possible"])
@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.9)], ids=str
)
def test_a_non_finite_row_gives_none_and_others_continue(
    break_row: Callable[[Tensor], Tensor], params: SamplingParams, sampler: Sampler
) -> None:
    logits = torch.stack([logits_of(seed) for seed in range(3)])
    draws = [Draw(replace(params, logprobs=2), 1, 1)] * 3
    tokens, scores = sampler(logits, draws)
    logits[1] = break_row(logits[1])
    assert sampler(logits, draws) == ([tokens[0], None, tokens[2]], [scores[0], None, scores[2]])


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
