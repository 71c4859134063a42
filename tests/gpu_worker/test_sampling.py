"""Sampled tokens against a slow loop over the whole vocabulary."""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from gpu_worker.request import SamplingParams
from gpu_worker.sampling import Draw, sample, uniform

VOCABULARY = 50


def logits_of(seed: int, vocabulary: int = VOCABULARY, size: float = 2.0) -> Tensor:
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * size


def kept_slowly(logits: Tensor, params: SamplingParams) -> dict[int, float]:
    """The ids that may be drawn, in the order they are tried, with their probabilities: exact, one id at a time."""
    scaled = [value / params.temperature for value in logits.double().tolist()]
    ranked = sorted(range(len(scaled)), key=lambda i: -scaled[i])[: params.top_k or None]
    mass = {i: math.exp(scaled[i] - scaled[ranked[0]]) for i in ranked}
    ranked = [i for i in ranked if mass[i] >= params.min_p]
    mass = {i: mass[i] for i in ranked}
    total, held = math.fsum(mass.values()), 0.0
    kept = []
    for i in ranked:
        if kept and held >= params.top_p * total:
            break
        kept.append(i)
        held += mass[i]
    if params.top_k == 0 and params.top_p == 1:
        kept.sort()
    return {i: mass[i] / held for i in kept}


@pytest.mark.parametrize(
    ("params", "vocabulary", "size"),
    [
        (SamplingParams(), 50, 2.0),
        (SamplingParams(temperature=0.3), 50, 2.0),
        (SamplingParams(top_p=0.8), 50, 2.0),
        (SamplingParams(top_p=1e-9), 50, 2.0),
        (SamplingParams(top_k=5), 50, 2.0),
        (SamplingParams(top_k=10, top_p=0.6), 50, 2.0),
        (SamplingParams(top_k=3, top_p=0.99, temperature=2.0), 50, 2.0),
        (SamplingParams(top_k=10_000, top_p=0.5), 50, 2.0),
        (SamplingParams(top_p=0.4), 3000, 0.1),  # nearly flat: about 1150 ids, then 2700
        (SamplingParams(top_p=0.9), 3000, 0.1),
        (SamplingParams(top_k=1500), 3000, 0.1),
        (SamplingParams(min_p=0.1), 50, 2.0),
        (SamplingParams(min_p=1.0), 50, 2.0),
        (SamplingParams(min_p=0.05, top_p=0.7, top_k=12, temperature=1.5), 50, 2.0),
        (SamplingParams(top_k=1500, top_p=0.95), 3000, 0.1),
    ],
)
def test_the_drawn_id_is_where_the_uniform_number_falls(params: SamplingParams, vocabulary: int, size: float) -> None:
    """Many uniform numbers walk the whole distribution: its ids, their order and their probabilities."""
    logits = logits_of(1, vocabulary, size)
    expected = kept_slowly(logits, params)
    ids, bounds = list(expected), list(accumulate(expected.values()))
    num_checked, drawn = 0, set()
    for position in range(800):
        [token] = sample(logits[None].clone(), [Draw(params, 3, position)])
        assert token in expected
        drawn.add(token)
        number = uniform(3, position)
        index = min(bisect_right(bounds, number), len(ids) - 1)
        if (
            min(abs(number - bound) for bound in bounds[max(index - 1, 0) : index + 1]) > 1e-5
        ):  # float32 may fall on either side of a bound
            assert token == ids[index]
            num_checked += 1
    assert num_checked > 650
    assert {i for i, share in expected.items() if share > 0.02} <= drawn


@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_row_draws_the_same_whoever_is_beside_it(place: int) -> None:
    params = SamplingParams(top_p=0.9, seed=11)
    logits = logits_of(3)
    alone = [sample(logits[None].clone(), [Draw(params, 11, position)])[0] for position in range(20)]
    for position in range(20):
        batch = torch.stack([logits_of(100 + i) for i in range(8)])
        batch[place] = logits
        draws = [Draw(SamplingParams(temperature=0.5 + i), i, 7) for i in range(8)]
        draws[place] = Draw(params, 11, position)
        assert sample(batch, draws)[place] == alone[position]
    assert len(set(alone)) > 3, "positions should draw different numbers"


def test_numbers_differ_by_position_and_by_seed() -> None:
    numbers = {uniform(seed, position) for seed in (0, 1, 2**63 - 1) for position in range(200)}
    assert len(numbers) == 600
    assert all(0 <= number < 1 for number in numbers)
    assert sum(numbers) / 600 == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(top_k=1, temperature=5.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_and_top_1_take_the_largest(params: SamplingParams, dtype: torch.dtype) -> None:
    logits = torch.stack([logits_of(seed, size=20.0) for seed in range(30)]).to(dtype)
    logits[range(30), range(10, 40)] = 300.0
    assert sample(logits, [Draw(params, 5, i) for i in range(30)]) == list(range(10, 40))


def test_forbidden_ids_are_not_drawn() -> None:
    logits = torch.zeros(2, 4)
    logits[:, 1] = 50.0
    greedy = Draw(SamplingParams(temperature=0), 0, 0, forbidden=(1,))
    for position in range(50):
        tokens = sample(logits.clone(), [greedy, Draw(SamplingParams(), 0, position, forbidden=(1, 2))])
        assert tokens[0] != 1
        assert tokens[1] in {0, 3}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_row_that_is_not_finite_gives_none_and_its_neighbours_go_on(value: float, temperature: float) -> None:
    logits = torch.stack([logits_of(seed) for seed in range(3)])
    expected = sample(logits.clone(), [Draw(SamplingParams(temperature=temperature), 1, 1)] * 3)
    logits[1, 7] = value
    found = sample(logits, [Draw(SamplingParams(temperature=temperature), 1, 1)] * 3)
    assert found == [expected[0], None, expected[2]]


def test_ids_of_probability_zero_are_never_drawn() -> None:
    logits = torch.full((1, 5), -math.inf)
    logits[0, 2] = 0.0
    assert {sample(logits.clone(), [Draw(SamplingParams(), 0, i)])[0] for i in range(50)} == {2}


@pytest.mark.parametrize("params", [SamplingParams(temperature=1e-45), SamplingParams(temperature=1e-40, top_p=0.9)])
def test_a_vanishing_temperature_is_greedy(params: SamplingParams) -> None:
    logits = logits_of(4)
    assert sample(logits[None].clone(), [Draw(params, 0, 0)]) == [int(logits.argmax())]
