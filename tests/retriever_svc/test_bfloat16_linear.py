"""Layers with bfloat16 products, and models that cannot run with them. Encoders are in test_openvino_network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from retriever_svc.bfloat16_linear import Bfloat16Linear, has_bfloat16_products, use_bfloat16
from retriever_svc.encoder import Vectors, unit_rows

needs_products = pytest.mark.skipif(not has_bfloat16_products(), reason="this processor has no bfloat16 products")


@needs_products
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_equals_float32_up_to_the_rounding_of_bfloat16(bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 80, bias=bias), torch.randn(2, 7, 48)
    with torch.inference_mode():
        found, expected = Bfloat16Linear(linear)(x), linear(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert not torch.equal(found, expected)


class _ReadsWeights(nn.Module):
    """Computes with a layer's weight in place of calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.layer.weight.T


@needs_products
@pytest.mark.parametrize("harm", ["reads weights", "other vectors", "not finite"])
def test_a_model_that_cannot_run_with_other_layers_keeps_its_own(harm: str) -> None:
    network = _ReadsWeights() if harm == "reads weights" else nn.Sequential(nn.Linear(4, 4))
    own = dict(network.named_modules())

    def encode(texts: list[str]) -> Vectors:
        with torch.inference_mode():
            rows = network(torch.eye(4)[: len(texts)])
        is_replaced = any(isinstance(layer, Bfloat16Linear) for layer in network.modules())
        if is_replaced and harm == "other vectors":
            rows = rows.flip(0)
        return unit_rows((rows * (float("nan") if is_replaced and harm == "not finite" else 1)).numpy())

    assert not use_bfloat16(network, encode)
    assert dict(network.named_modules()) == own
