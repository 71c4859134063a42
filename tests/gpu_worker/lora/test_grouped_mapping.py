"""The compiled products compared with a loop over every token, in the worker's precisions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from gpu_worker.lora.grouped_mapping import grouped_mapping, num_pair_values
from gpu_worker.lora.lora_kernel import LoraKernel
from lora_store.adapter import AdapterWeights, ModuleWeights
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.slow_lora import TOLERANCE, WIDTHS, assert_adds_as_the_loop, pool_of, random_plans, settled
from tests.tiny import plan_of


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_in", [1, 17, 64], ids=lambda width: f"in{width}")
@pytest.mark.parametrize("num_rows", [3, 40])
def test_grouped_products_equal_a_loop_over_tokens(
    num_rows: int, num_in: int, dtype: torch.dtype, lora_kernel: LoraKernel
) -> None:
    pool = pool_of([4, 1, 7, 8, 3, 66], num_in, WIDTHS, dtype)
    bank, residency = settled(pool, num_in, WIDTHS, dtype)
    plans = random_plans(pool, num_rows)
    counts = [1 + row % 3 for row in range(num_rows)]
    assert_adds_as_the_loop(grouped_mapping(plans, counts, residency, lora_kernel), bank, pool, plans, counts)


@pytest.fixture(params=[1, 3], ids=lambda number: f"{number}threads")
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [5, 700])
def test_tokens_that_fill_several_tasks_equal_the_loop(
    width: int, dtype: torch.dtype, num_threads: int, lora_kernel: LoraKernel
) -> None:
    """With one thread and 700 columns, the sums of 99 tokens are more than one task holds."""
    pool = pool_of([5, 8, 1], 32, {"m": width}, dtype)
    bank, residency = settled(pool, 32, {"m": width}, dtype)
    mixture = plan_of("mixture", (pool[0], 0.5), (pool[1], -1.0))
    plans = [
        mixture,
        BASE_PLAN,
        plan_of("fusion", (pool[2], 1.0), (pool[1], 0.3)),
        plan_of("selection", (pool[1], 1.0)),
    ]
    counts = [50, 3, 40, 9]
    assert_adds_as_the_loop(grouped_mapping(plans, counts, residency, lora_kernel), bank, pool, plans, counts)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_rows_sum_has_the_same_order_in_every_batch(
    dtype: torch.dtype, num_threads: int, lora_kernel: LoraKernel
) -> None:
    """In float32 2^24 + 1 - 2^24 is 0, and 2^24 - 2^24 + 1 is 1."""
    pool = [
        AdapterWeights(digest, {"m": ModuleWeights(torch.ones(1, 4), torch.full((33, 1), value), 1.0)})
        for digest, value in (("c", -(2.0**24)), ("b", 1.0), ("a", 2.0**24))
    ]
    bank, residency = settled(pool, 4, {"m": 33}, dtype)
    orders = list(itertools.permutations(pool))
    plans = [plan_of("mixture", *[(weights, 1.0) for weights in order]) for order in orders]
    x = torch.tensor([1.0, 0, 0, 0], dtype=dtype).expand(12, 4)
    for first in range(6):
        y = torch.zeros(12, 33, dtype=dtype)
        batch = plans[first:] + plans[:first]
        grouped_mapping(batch, [2] * 6, residency, lora_kernel).add(x, [(y, bank.modules["m"])])
        assert not y.any()  # in the order of digests: a, b, c


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_adapters_outside_a_plan_are_never_read(dtype: torch.dtype, lora_kernel: LoraKernel) -> None:
    pool = pool_of([4, 4], 16, {"m": 16})
    bank, residency = settled(pool, 16, {"m": 16}, dtype)
    bank.modules["m"].bt[residency.rows("1")] = float("nan")
    plans = [plan_of("mixture", (pool[0], 1.0), (pool[1], 0.0)), BASE_PLAN, plan_of("selection", (pool[1], 1.0))]
    y = torch.zeros(1, 3, 16, dtype=dtype)
    grouped_mapping(plans, [1, 1, 1], residency, lora_kernel).add(
        torch.ones(1, 3, 16, dtype=dtype), [(y, bank.modules["m"])]
    )
    assert y[0].isfinite().all(dim=1).tolist() == [True, True, False]
    assert not y[0, 1].any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [1, 16, 33])
def test_columns_of_a_wider_output_get_the_same_values_and_their_neighbours_stay(
    width: int, dtype: torch.dtype, lora_kernel: LoraKernel
) -> None:
    pool = pool_of([4, 3], 16, {"m": width})
    bank, residency = settled(pool, 16, {"m": width}, dtype)
    plans = [plan_of("mixture", (pool[0], 0.5), (pool[1], -1.0)), BASE_PLAN, plan_of("fusion", (pool[1], 1.0))]
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected, wide = torch.zeros(5, width, dtype=dtype), torch.full((5, width + 7), 3.0, dtype=dtype)
    wide[:, 4 : 4 + width] = 0
    grouped_mapping(plans, [2, 1, 2], residency, lora_kernel).add(x, [(expected, bank.modules["m"])])
    grouped_mapping(plans, [2, 1, 2], residency, lora_kernel).add(x, [(wide[:, 4 : 4 + width], bank.modules["m"])])
    assert expected.any()
    assert torch.equal(wide[:, 4 : 4 + width], expected)
    assert bool((wide[:, :4] == 3).all()) and bool((wide[:, 4 + width :] == 3).all())


def test_the_cost_is_the_rank_rows_of_every_tokens_plan() -> None:
    pool = pool_of([2, 5], 16, {"m": 16})
    _, residency = settled(pool, 16, {"m": 16}, torch.float32)
    plans = [plan_of("mixture", (pool[0], 0.5), (pool[1], 0.5)), BASE_PLAN, plan_of("selection", (pool[1], 1.0))]
    assert num_pair_values(plans, [3, 100, 4], residency) == 3 * (2 + 5) + 4 * 5
    assert num_pair_values([], [], residency) == 0
