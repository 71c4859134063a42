from __future__ import annotations

import pytest
import torch

from lora_store import ModuleWeights
from lora_store.composition import compose

SHARED, OWN = "model.layers.0.up", "model.layers.0.q"


def module(seed: int, rank: int, scaling: float, dtype: torch.dtype = torch.float32) -> ModuleWeights:
    random = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, 10, generator=random), torch.randn(12, rank, generator=random)
    return ModuleWeights(a.to(dtype), b.to(dtype), scaling)


def product(weights: ModuleWeights) -> torch.Tensor:
    return weights.scaling * weights.lora_b.double() @ weights.lora_a.double()


PARTS = [
    ({SHARED: module(1, 4, 2.0), OWN: module(2, 2, 2.0)}, 0.7),
    ({SHARED: module(3, 3, 6 / 3**0.5, torch.bfloat16)}, -0.4),
]


def test_the_composition_is_the_weighted_sum_of_every_module() -> None:
    composed, error = compose(PARTS)
    assert (error, composed[SHARED].rank, composed[OWN].rank) == (0.0, 7, 2)
    sums = {
        SHARED: 0.7 * product(PARTS[0][0][SHARED]) - 0.4 * product(PARTS[1][0][SHARED]),
        OWN: 0.7 * product(PARTS[0][0][OWN]),
    }
    for name, expected in sums.items():
        torch.testing.assert_close(product(composed[name]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_lower_rank_is_the_best_one_and_its_error_is_that_of_the_whole_matrix(rank: int) -> None:
    exact, _ = compose(PARTS)
    composed, error = compose(PARTS, rank)
    whole = left_out = 0.0
    for name, weights in exact.items():
        left, values, right = torch.linalg.svd(product(weights), full_matrices=False)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        torch.testing.assert_close(product(composed[name]), best, atol=1e-5, rtol=1e-5)
        assert composed[name].rank == min(rank, weights.rank)
        whole += float(values.square().sum())
        left_out += float(values[rank:].square().sum())
    assert error == pytest.approx((left_out / whole) ** 0.5, rel=1e-6)


def test_a_rank_that_holds_the_sum_loses_nothing() -> None:
    composed, error = compose(PARTS, 64)
    assert error < 1e-7
    torch.testing.assert_close(product(composed[SHARED]), product(compose(PARTS)[0][SHARED]), atol=1e-5, rtol=1e-5)


def test_adapters_that_cancel_out_have_no_error() -> None:
    assert compose([(PARTS[0][0], 0.0)], 1)[1] == 0.0
