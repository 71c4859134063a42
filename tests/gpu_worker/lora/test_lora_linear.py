"""A linear layer with the adapters of each token's plan, against the base layer and the products of the definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gpu_worker.attention.kv_pages import HostKvCache
from gpu_worker.bank.bank import LoraBank
from gpu_worker.bank.residency import Residency
from gpu_worker.lora.dense_mapping import DenseMapping
from gpu_worker.lora.grouped_mapping import GroupedMapping
from gpu_worker.lora.lora_kernel import LoraKernel
from gpu_worker.lora.lora_linear import LoraLinear
from gpu_worker.lora.mapping import composition
from gpu_worker.step.attention_plan import Segment
from gpu_worker.step.step_context import StepContext
from lora_store.adapter import AdapterRef, AdapterWeights, ModuleWeights
from lora_store.plan import Plan, PlannedAdapter
from tests.gpu_worker.engine_driver import kv_shape


@pytest.mark.parametrize("same_input", [True, False])
@pytest.mark.parametrize("is_grouped", [True, False])
def test_modules_that_share_a_product_get_their_own_part(
    same_input: bool, is_grouped: bool, lora_kernel: LoraKernel
) -> None:
    linears = {"x.gate_proj": nn.Linear(3, 5), "x.up_proj": nn.Linear(3, 4)}
    bank = LoraBank(linears, 4, free_fill=float("nan"))
    weights = AdapterWeights(
        "1",
        {name: ModuleWeights(torch.randn(2, 3), torch.randn(w.out_features, 2), 0.5) for name, w in linears.items()},
    )
    residency = Residency(bank)
    assert residency.try_pin(["1"], {"1": bank.to_device_layout(weights)})
    residency.settle()
    step = StepContext()
    plan = Plan("selection", (PlannedAdapter(AdapterRef("t", "n", "1"), "1", 1.0),))
    kernel = lora_kernel if is_grouped else None
    lora = composition([plan], [2], residency, torch.float32, kernel, torch.device("cpu"))
    assert isinstance(lora, GroupedMapping if is_grouped else DenseMapping)
    step.fill(lora, HostKvCache(kv_shape()).attention([Segment(0, 0, 2, 0)]))
    inputs = [torch.randn(1, 2, 3)] * 2 if same_input else [torch.randn(1, 2, 3) for _ in range(2)]
    with torch.inference_mode():
        for x, (name, linear) in zip(inputs, linears.items(), strict=True):
            module = weights.modules[name]
            expected = linear(x) + x @ module.lora_a.T @ module.lora_b.T * module.scaling
            torch.testing.assert_close(LoraLinear(linear, bank.modules[name], step)(x), expected)
