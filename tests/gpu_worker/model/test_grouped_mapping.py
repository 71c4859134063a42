"""The compiled products compared with a loop over every token, in the worker's precisions."""

from __future__ import annotations

import itertools

import pytest
import torch

from gpu_worker.model.grouped_mapping import grouped_mapping, num_pair_values
from gpu_worker.model.lora_kernel import LoraKernel
from lora_store.adapter import AdapterWeights, ModuleWeights
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.slow_lora import TOLERANCE, WIDTHS, assert_adds_as_the_loop, pool_of, random_plans, settled
from tests.tiny import plan_of

# A compiler may join a product and a sum for some numbers of tokens, and round once less.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.0}


@pytest.fixture(params=[1, 3], ids=lambda number: f"{number}threads")
def num_threads(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(request.param)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_in", [1, 17, 64], ids=lambda width: f"in{width}")
@pytest.mark.parametrize("num_rows", [3, 20, 40])
def test_grouped_products_equal_a_loop_over_tokens(
    num_rows: int, num_in: int, dtype: torch.dtype, num_threads: None, lora_kernel: LoraKernel
) -> None:
    pool = pool_of([4, 1, 7, 8, 3, 66], num_in, WIDTHS, dtype)
    bank, residency = settled(pool, num_in, WIDTHS, dtype)
    plans = random_plans(pool, num_rows)
    counts = [1 + row % 3 for row in range(num_rows)]
    assert_adds_as_the_loop(grouped_mapping(plans, counts, residency, lora_kernel), bank, pool, plans, counts)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [5, 700, 1100])
@pytest.mark.parametrize("splits_rows", [False, True])
def test_tokens_that_fill_several_tasks_equal_the_loop(
    splits_rows: bool, width: int, dtype: torch.dtype, num_threads: None, lora_kernel: LoraKernel
) -> None:
    """Rows of one token that have more sums than one task holds, or rows of more tokens than a task takes."""
    pool = pool_of([5, 8, 1], 32, {"m": width}, dtype)
    bank, residency = settled(pool, 32, {"m": width}, dtype)
    mixture = plan_of("mixture", (pool[0], 0.5), (pool[1], -1.0))
    plans = [
        mixture,
        BASE_PLAN,
        plan_of("fusion", (pool[2], 1.0), (pool[1], 0.3)),
        plan_of("selection", (pool[1], 1.0)),
    ]
    counts = [90, 3, 40, 9]
    if splits_rows:
        plans = [plan for plan, count in zip(plans, counts, strict=True) for _ in range(count)]
        counts = [1] * len(plans)
    assert_adds_as_the_loop(grouped_mapping(plans, counts, residency, lora_kernel), bank, pool, plans, counts)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("are_shared", [True, False])
def test_the_sums_do_not_depend_on_how_threads_divide_the_work(
    are_shared: bool, dtype: torch.dtype, lora_kernel: LoraKernel
) -> None:
    """They divide the columns if they share most adapters or are many, and the tokens otherwise."""
    pool = pool_of([4, 1, 7, 8], 64, WIDTHS, dtype)
    bank, residency = settled(pool, 64, WIDTHS, dtype)
    places = [(n % 4, (n + 1) % 4) if are_shared else (n // 6,) for n in range(24)]
    plans = [plan_of("mixture", *[(pool[place], 0.5 + place) for place in row]) for row in places]
    x, found = torch.randn(24, 64).to(dtype), []
    for count in (1, 2, 3, 5, 30):
        torch.set_num_threads(count)
        outputs = [(torch.zeros(24, WIDTHS[name], dtype=dtype), module) for name, module in bank.modules.items()]
        grouped_mapping(plans, [1] * 24, residency, lora_kernel).add(x, outputs)
        found.append(torch.cat([y for y, _ in outputs], dim=1))
    assert found[0].isfinite().all() and found[0].any(dim=1).all()
    for y in found:
        torch.testing.assert_close(y, found[0], rtol=0, atol=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_tokens", [60, 64])
def test_few_tokens_have_wide_sums_in_several_parts(
    num_tokens: int, dtype: torch.dtype, lora_kernel: LoraKernel
) -> None:
    """One thread has all columns of decoded tokens, of which it takes 1,024 at a time."""
    widths = {"x.q_proj": 2500, "x.k_proj": 5}
    pool = pool_of([4, 8], 16, widths, dtype)
    bank, residency = settled(pool, 16, widths, dtype)
    plans, counts = [plan_of("mixture", (pool[0], 0.5), (pool[1], -1.0))] * num_tokens, [1] * num_tokens
    assert_adds_as_the_loop(grouped_mapping(plans, counts, residency, lora_kernel), bank, pool, plans, counts)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_rows_sum_has_the_same_order_in_every_batch(
    dtype: torch.dtype, num_threads: None, lora_kernel: LoraKernel
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
def test_plans_whose_weights_are_all_zero_add_nothing(
    dtype: torch.dtype, num_threads: None, lora_kernel: LoraKernel
) -> None:
    pool = pool_of([4], 16, {"m": 16})
    bank, residency = settled(pool, 16, {"m": 16}, dtype)
    plans, y = [plan_of("mixture", (pool[0], 0.0))] * 2, torch.full((13, 16), 3.0, dtype=dtype)
    x = torch.ones(13, 16, dtype=dtype)
    grouped_mapping(plans, [1, 12], residency, lora_kernel).add(x, [(y, bank.modules["m"])])
    assert bool((y == 3).all())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "counts", [[1, 9, 2, 30, 1], [8, 7], [9], [9, *[1] * 70]], ids=lambda counts: f"{len(counts)}rows"
)
def test_rows_of_few_and_of_many_tokens_share_a_step(
    counts: list[int], dtype: torch.dtype, num_threads: None, lora_kernel: LoraKernel
) -> None:
    """A row's result is the same alone, and token by token."""
    pool = pool_of([4, 1, 7, 66], 64, WIDTHS, dtype)
    bank, residency = settled(pool, 64, WIDTHS, dtype)
    plans = [plan for plan in random_plans(pool, 8 + len(counts)) if plan.strategy != "base"][: len(counts)]
    assert_adds_as_the_loop(grouped_mapping(plans, counts, residency, lora_kernel), bank, pool, plans, counts)
    x, starts = torch.randn(sum(counts), 64).to(dtype), [0, *itertools.accumulate(counts)]

    def added(rows: list[int], of_rows: list[int], x: torch.Tensor) -> torch.Tensor:
        outputs = [(torch.zeros(len(x), WIDTHS[name], dtype=dtype), module) for name, module in bank.modules.items()]
        grouped_mapping([plans[row] for row in rows], of_rows, residency, lora_kernel).add(x, outputs)
        return torch.cat([y for y, _ in outputs], dim=1)

    together = added(list(range(len(counts))), counts, x)
    assert together.any(dim=1).all()
    for row, count in enumerate(counts):
        own = x[starts[row] : starts[row + 1]]
        expected = together[starts[row] : starts[row + 1]]
        for found in (added([row], [count], own), added([row] * count, [1] * count, own)):
            torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("count", [1, 9])
def test_adapters_outside_a_plan_are_never_read(count: int, dtype: torch.dtype, lora_kernel: LoraKernel) -> None:
    pool = pool_of([4, 4], 16, {"m": 16})
    bank, residency = settled(pool, 16, {"m": 16}, dtype)
    bank.modules["m"].bt[residency.rows("1")] = float("nan")
    plans = [plan_of("mixture", (pool[0], 1.0), (pool[1], 0.0)), BASE_PLAN, plan_of("selection", (pool[1], 1.0))]
    x, y = torch.ones(1, 3 * count, 16, dtype=dtype), torch.zeros(1, 3 * count, 16, dtype=dtype)
    grouped_mapping(plans, [count] * 3, residency, lora_kernel).add(x, [(y, bank.modules["m"])])
    first, base, poisoned = y.view(3, count, 16)
    assert first.isfinite().all() and first.any() and not base.any()
    assert poisoned.isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [1, 16, 33])
@pytest.mark.parametrize("counts", [[2, 1, 2], [9, 1, 12]], ids=str)
def test_columns_of_a_wider_output_get_the_same_values_and_their_neighbours_stay(
    counts: list[int], width: int, dtype: torch.dtype, lora_kernel: LoraKernel
) -> None:
    pool = pool_of([4, 3], 16, {"m": width})
    bank, residency = settled(pool, 16, {"m": width}, dtype)
    plans = [plan_of("mixture", (pool[0], 0.5), (pool[1], -1.0)), BASE_PLAN, plan_of("fusion", (pool[1], 1.0))]
    x = torch.randn(sum(counts), 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected, wide = torch.zeros(len(x), width, dtype=dtype), torch.full((len(x), width + 7), 3.0, dtype=dtype)
    wide[:, 4 : 4 + width] = 0
    grouped_mapping(plans, counts, residency, lora_kernel).add(x, [(expected, bank.modules["m"])])
    grouped_mapping(plans, counts, residency, lora_kernel).add(x, [(wide[:, 4 : 4 + width], bank.modules["m"])])
    assert expected.any()
    assert torch.equal(wide[:, 4 : 4 + width], expected)
    assert bool((wide[:, :4] == 3).all()) and bool((wide[:, 4 + width :] == 3).all())


def test_the_cost_is_the_rank_rows_of_every_tokens_plan() -> None:
    pool = pool_of([2, 5], 16, {"m": 16})
    _, residency = settled(pool, 16, {"m": 16}, torch.float32)
    plans = [plan_of("mixture", (pool[0], 0.5), (pool[1], 0.5)), BASE_PLAN, plan_of("selection", (pool[1], 1.0))]
    assert num_pair_values(plans, [3, 100, 4], residency) == 3 * (2 + 5) + 4 * 5
    assert num_pair_values([], [], residency) == 0
