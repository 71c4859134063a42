"""Base weights in the layout the processor multiplies, laid out once instead of at every step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_STEP_ROWS = 32  # oneDNN picks the layout by the number of rows it expects; any number may come


class PackedLinear(nn.Module):
    """A linear layer without its plain weight: `forward` gives what `nn.functional.linear` gives, bit for bit.

    torch 2.13 lays a bfloat16 weight out anew at each product: a decode step of 32 rows spends a third of its time
    on it. The operators are those TorchInductor freezes a model with.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _STEP_ROWS)
        self._bias = bias

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y


def packed(linear: nn.Linear) -> nn.Module:
    """The layer with its weight packed, where that is known to pay; else the layer itself."""
    weight = linear.weight
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return linear
    is_built = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not is_built or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return linear
    return PackedLinear(weight, linear.bias)
