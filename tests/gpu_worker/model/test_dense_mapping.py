"""The two dense products compared with a loop over every token, in the worker's precisions."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.model.dense_mapping import dense_mapping
from lora_store.plan import BASE_PLAN
from tests.gpu_worker.slow_lora import CPU, TOLERANCE, WIDTHS, assert_adds_as_the_loop, pool_of, random_plans, settled
from tests.tiny import plan_of


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_in", [1, 64], ids=lambda width: f"in{width}")
@pytest.mark.parametrize("num_rows", [3, 40])
def test_dense_products_equal_a_loop_over_tokens(num_rows: int, num_in: int, dtype: torch.dtype) -> None:
    pool = pool_of([4, 1, 7, 8, 3, 16], num_in, WIDTHS, dtype)
    bank, residency = settled(pool, num_in, WIDTHS, dtype)
    plans = random_plans(pool, num_rows)
    counts = [1 + row % 3 for row in range(num_rows)]
    assert_adds_as_the_loop(dense_mapping(plans, counts, residency, dtype, CPU), bank, pool, plans, counts)


@pytest.mark.parametrize("strategy", ["mixture", "fusion"])
def test_adapters_that_overflow_change_only_the_rows_that_use_them(strategy: str) -> None:
    pool = pool_of([4, 4], 16, {"m": 16})
    bank, residency = settled(pool, 16, {"m": 16}, torch.float32)
    bank.modules["m"].a[residency.rows("1")] = 3e38  # their product with the input is infinite
    plans = [
        plan_of("fusion", (pool[0], 1.0)),
        BASE_PLAN,
        plan_of(strategy, (pool[0], 0.5), (pool[1], 0.5)),  # type: ignore[arg-type]
    ]
    y = torch.zeros(1, 3, 16)
    dense_mapping(plans, [1, 1, 1], residency, torch.float32, CPU).add(
        torch.full((1, 3, 16), 9.0), [(y, bank.modules["m"])]
    )
    assert y[0].isfinite().all(dim=1).tolist() == [True, True, False]
    assert y[0, 0].any() and not y[0, 1].any()


def test_an_input_that_several_modules_read_is_multiplied_once() -> None:
    """The second module's A has no effect until a new input arrives."""
    pool = pool_of([4], 16, WIDTHS)
    bank, residency = settled(pool, 16, WIDTHS, torch.float32)
    lora = dense_mapping([plan_of("selection", (pool[0], 1.0))], [2], residency, torch.float32, CPU)
    x, first, second, third = torch.randn(1, 2, 16), *(torch.zeros(1, 2, 5) for _ in range(3))
    module = bank.modules["x.k_proj"]
    lora.add(x, [(first, module)])
    module.a[:] = 0
    lora.add(x, [(second, module)])
    lora.add(x.clone(), [(third, module)])
    assert torch.equal(first, second) and first.any() and not third.any()
