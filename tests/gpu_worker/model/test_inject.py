"""The layers that an adapter may target, and that replacing them alone changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gpu_worker.bank.bank import LoraBank
from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.base_model import BaseModel
from gpu_worker.model.inject import inject, target_linears
from gpu_worker.model.lora_linear import LoraLinear
from gpu_worker.model.step_context import StepContext
from tests.tiny import FAMILIES


class Router(nn.Linear):
    """A layer that computes more than its class does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(dim=-1)


class Renamed(nn.Linear):
    """A layer of another class that computes the same."""


def test_every_linear_layer_but_the_output_head_is_a_target() -> None:
    head, own = nn.Linear(2, 9), Renamed(2, 2)
    parts = {"up": nn.Linear(2, 3), "norm": nn.LayerNorm(2), "own": own, "router": Router(2, 2), "lm_head": head}
    model = nn.ModuleDict({"layer": nn.ModuleDict(parts)})
    assert list(target_linears(model, head)) == ["layer.up", "layer.own"]
    assert list(target_linears(model, None)) == ["layer.up", "layer.own", "layer.lm_head"]


def test_a_model_without_targets_is_refused() -> None:
    head = nn.Linear(2, 9)
    with pytest.raises(BaseModelUnsupported, match="no linear layer"):
        target_linears(nn.Sequential(nn.LayerNorm(2), Router(2, 2), head), head)


@pytest.mark.parametrize("family", FAMILIES)
def test_replaced_layers_without_adapters_compute_what_their_layers_do(
    family: str, tiny_base: Callable[..., BaseModel]
) -> None:
    model = tiny_base(family).model
    linears = target_linears(model, model.get_output_embeddings())
    inputs = {name: torch.randn(3, linear.in_features) for name, linear in linears.items()}
    with torch.inference_mode():
        expected = {name: linear(inputs[name]) for name, linear in linears.items()}
        inject(model, LoraBank(linears, 4, free_fill=float("nan")), StepContext())
        replaced = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
        assert set(replaced) == set(linears) and len(linears) == 7 * 3
        for name, layer in replaced.items():
            torch.testing.assert_close(layer(inputs[name]), expected[name])
            assert layer.base is linears[name], "float32 layers are not packed"
