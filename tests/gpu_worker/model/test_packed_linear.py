from __future__ import annotations

import pytest
import torch
from torch import nn

from gpu_worker.model.packed_linear import PackedLinear, packed

needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor does not multiply bfloat16"
)


@needs_bf16
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 0, 40), (1, 1, 40), (1, 7, 40), (1, 33, 40), (3, 40)], ids=str)
def test_a_packed_layer_equals_the_plain_one(shape: tuple[int, ...], has_bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(40, 24, bias=has_bias).bfloat16()
    x = torch.randn(shape).bfloat16()
    with torch.inference_mode():
        layer = packed(linear)
        assert isinstance(layer, PackedLinear)
        assert torch.equal(layer(x), linear(x))


def test_layers_of_other_precisions_are_not_packed() -> None:
    linear = nn.Linear(8, 4)
    assert packed(linear) is linear
