"""The choice between the two ways to compute a step's LoRA products."""

from __future__ import annotations

import torch

from gpu_worker.lora.dense_mapping import DenseMapping
from gpu_worker.lora.grouped_mapping import GroupedMapping
from gpu_worker.lora.lora_kernel import LoraKernel
from gpu_worker.lora.mapping import composition
from lora_store.plan import BASE_PLAN, Plan
from tests.gpu_worker.slow_lora import CPU, pool_of, settled
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
