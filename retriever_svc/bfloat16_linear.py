"""Run an encoder's linear layers in bfloat16, where the processor has such products: about half the time of float32.

It serves models that OpenVINO cannot run (`openvino_network.py`).

All else stays float32: normalisations, attention, sums of layers and pooling. The vectors are those of the float32
encoder up to a cosine of about 0.99997, so both may be in one index.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_STEP_ROWS = 64  # oneDNN chooses the layout of the weight for this number of tokens; other numbers work too
_LEAST_COSINE = 0.999  # to the float32 vectors
_PROBES = ("Is it so?", "Translate to French: the cat sleeps on the old sofa in the kitchen.", "2 + 2 = ")


class Bfloat16Linear(nn.Module):
    """A linear layer of float32 input and output that multiplies bfloat16 numbers. The weight is packed once."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().bfloat16()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _STEP_ROWS)
        self._bias = None if linear.bias is None else linear.bias.detach().bfloat16()

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self._weight, self._bias, "none", [], "")
        return y.float()


def has_bfloat16_products() -> bool:
    """Return whether this processor multiplies bfloat16 numbers, and torch uses that."""
    capabilities = torch.cpu.get_capabilities()
    has_products = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    is_built = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_products and is_built and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def use_bfloat16(network: nn.Module, encode: Callable[[list[str]], NDArray[np.float32]]) -> bool:
    """Replace the linear layers of `network` in place. Return whether they stay replaced.

    Both encode a few texts into unit rows. Where the vectors differ, or the model cannot run with other layers, it
    keeps its own.
    """
    own = {name: layer for name, layer in network.named_modules() if type(layer) is nn.Linear}
    expected = encode(list(_PROBES))
    for name, layer in own.items():
        _put(network, name, Bfloat16Linear(layer))
    try:
        found = encode(list(_PROBES))
        is_alike = bool(((found * expected).sum(axis=1) > _LEAST_COSINE).all())  # NaN is not
    except (AttributeError, RuntimeError, TypeError):  # the model reads its layers' weights, for example
        is_alike = False
    if not is_alike:
        for name, layer in own.items():
            _put(network, name, layer)
    return is_alike


def _put(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, layer)
