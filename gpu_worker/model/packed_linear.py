"""Pack base weights once into the layout that the processor multiplies, instead of at every step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_STEP_ROWS = 32  # oneDNN chooses the layout for this number of rows; other numbers work too


class PackedLinear(nn.Module):
    """A linear layer with a packed weight. `forward` equals `nn.functional.linear` bit for bit.

    torch 2.13 packs a bfloat16 weight again at each product, which takes a third of a decode step of 32 rows. The
    operators are those that TorchInductor uses to freeze a model.
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
    """Return the layer with a packed weight if that is known to be faster, else the layer itself."""
    weight = linear.weight
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return linear
    is_built = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not is_built or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return linear
    return PackedLinear(weight, linear.bias)
