"""The choice between the two ways to compute a step's LoRA products."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.model.dense_mapping import DenseMapping
from gpu_worker.model.grouped_mapping import GroupedMapping
from gpu_worker.model.lora_kernel import LoraKernel
from gpu_worker.model.mapping import Composer, composition
from lora_store.plan import BASE_PLAN, Plan
from tests.gpu_worker.slow_lora import CPU, assert_adds_as_the_loop, pool_of, settled
from tests.tiny import plan_of

POOL = pool_of([8, 8, 8], 16, {"m": 16})
THREE = plan_of("mixture", *[(weights, 1 / 3) for weights in POOL])
ONE = plan_of("selection", (POOL[0], 1.0))


def kind_of(num_tokens: int, plan: Plan, kernel: LoraKernel | None) -> type:
    _, residency = settled(POOL, 16, {"m": 16}, torch.float32)
    return type(composition([plan], [num_tokens], residency, torch.float32, kernel, CPU))


def test_many_tokens_of_few_adapters_take_the_dense_products(lora_kernel: LoraKernel) -> None:
    assert kind_of(1, THREE, lora_kernel) is GroupedMapping
    assert kind_of(1000, THREE, lora_kernel) is DenseMapping
    assert kind_of(1000, ONE, lora_kernel) is GroupedMapping  # it reads a third of the rows


def test_without_the_kernel_every_step_takes_the_dense_products() -> None:
    assert {kind_of(num_tokens, plan, None) for num_tokens in (1, 1000) for plan in (ONE, THREE)} == {DenseMapping}


def test_a_step_of_the_base_model_alone_has_no_products(lora_kernel: LoraKernel) -> None:
    assert kind_of(1000, BASE_PLAN, lora_kernel) is kind_of(1, BASE_PLAN, None) is type(None)


def test_rows_outside_the_prefix_are_moved_there_for_the_dense_products_only(lora_kernel: LoraKernel) -> None:
    """Of three adapters the last is pinned alone, so its rows are behind those of the others."""
    bank, residency = settled(POOL, 16, {"m": 16}, torch.float32, is_packed=False)
    residency.unpin([weights.weights_digest for weights in POOL[:2]])
    residency.settle()
    plan, rows = plan_of("selection", (POOL[2], 1.0)), list(range(16, 24))
    assert (residency.rows("2"), residency.active_rows, residency.num_misplaced) == (rows, 8, 8)
    for num_tokens, kernel in ((1, lora_kernel), (1000, None)):
        assert residency.rows("2") == rows
        lora = composition([plan], [num_tokens], residency, torch.float32, kernel, CPU)
        assert lora is not None
        assert_adds_as_the_loop(lora, bank, POOL, [plan], [num_tokens])
    assert (residency.rows("2"), residency.num_misplaced) == (list(range(8)), 0)
    torch.testing.assert_close(bank.modules["m"].a, POOL[2].modules["m"].lora_a)


def test_moving_many_rows_makes_the_grouped_products_cheaper(lora_kernel: LoraKernel) -> None:
    """For 330 tokens with 24 rows each they take 14,256 units; the dense ones 13,920, and 800 for eight moves."""
    pool = pool_of([8] * 4, 16, {"m": 16})
    plan = plan_of("mixture", *[(weights, 1 / 3) for weights in pool[1:]])
    for is_packed, kind in ((True, DenseMapping), (False, GroupedMapping)):
        _, residency = settled(pool, 16, {"m": 16}, torch.float32, is_packed=is_packed)
        residency.unpin(["0"])
        residency.settle()
        assert residency.num_misplaced == (0 if is_packed else 8)
        assert type(composition([plan], [330], residency, torch.float32, lora_kernel, CPU)) is kind


@pytest.mark.parametrize("is_compiled", [True, False])
def test_rows_that_decode_again_keep_their_composition_until_an_adapter_leaves(
    is_compiled: bool, lora_kernel: LoraKernel
) -> None:
    bank, residency = settled(POOL, 16, {"m": 16}, torch.float32)
    compose = Composer(residency, torch.float32, lora_kernel if is_compiled else None, CPU)
    plans = [ONE, plan_of("mixture", (POOL[1], 1.0), (POOL[2], 0.5))]
    first = compose(plans, [1, 1])
    assert compose(list(plans), [1, 1]) is first is not None
    assert compose(plans, [1, 2]) is not first
    assert compose(plans[::-1], [1, 2]) is not compose(plans, [1, 2])
    last = compose(plans[1:], [1])
    residency.unpin(["0"])
    residency.settle()  # moves the rows of the others
    lora = compose(plans[1:], [1])
    assert lora is not None and lora is not last
    assert_adds_as_the_loop(lora, bank, POOL, plans[1:], [1])


def test_a_composition_that_failed_is_not_kept(lora_kernel: LoraKernel) -> None:
    _, residency = settled(POOL, 16, {"m": 16}, torch.float32)
    compose = Composer(residency, torch.float32, lora_kernel, CPU)
    first = compose([THREE], [1])
    with pytest.raises(KeyError):
        compose([plan_of("selection", (pool_of([1] * 4, 16, {"m": 16})[3], 1.0))], [1])
    assert compose([THREE], [1]) is not first
