"""The layers that an adapter may target, and that replacing them alone changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gpu_worker.bank.bank import LoraBank
from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.base_model import BaseModel, load_base_model
from gpu_worker.model.inject import inject, target_linears
from gpu_worker.model.lora_linear import LoraLinear
from gpu_worker.model.packed_linear import KernelLinear, LinearKernel
from gpu_worker.model.step_context import StepContext
from tests.gpu_worker.engine_driver import compiled
from tests.tiny import FAMILIES, tiny_config


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


@pytest.mark.parametrize(
    ("family", "quantization", "num_matrices"),
    [("gemma3", "none", 1), ("gemma3", "int8", 1), ("gemma3", "int4", 1), ("llama", "int8", 2), ("llama", "int4", 2)],
)
def test_an_embedding_is_looked_up_in_the_matrix_that_its_model_has_packed(
    family: str, quantization: str, num_matrices: int, tiny_folders: Mapping[str, Path]
) -> None:
    """A tied model keeps one matrix for its embedding and its output head."""
    config = tiny_config(tiny_folders[family], dtype="bfloat16", quantization=quantization)
    model = load_base_model(config).model
    ids = torch.randint(300, (2, 7))
    expected = model.get_input_embeddings()(ids)
    linears = target_linears(model, model.get_output_embeddings())
    inject(model, LoraBank(linears, 4), StepContext(), compiled(LinearKernel.load))
    with torch.inference_mode():
        assert torch.equal(model.get_input_embeddings()(ids), expected)
        assert model.get_input_embeddings()(ids[:, :0]).shape == (2, 0, 32)
    assert not [parameter for parameter in model.parameters() if len(parameter) >= 300]
    matrices = {id(module) for module in model.modules() if isinstance(module, KernelLinear)}
    assert len(matrices) == 7 * 3 + num_matrices


def test_an_embedding_of_its_own_stays_as_it_is(tiny_folders: Mapping[str, Path]) -> None:
    model = load_base_model(tiny_config(tiny_folders["llama"], dtype="bfloat16")).model
    embedding = model.get_input_embeddings()
    linears = target_linears(model, model.get_output_embeddings())
    inject(model, LoraBank(linears, 4), StepContext(), compiled(LinearKernel.load))
    assert model.get_input_embeddings() is embedding


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
