"""Replace the model's normalisation and gated MLP by `fused.cpp`: one pass instead of ten and three operations.

A decode step of Gemma-3-270M has 109 small normalisations, whose cost is the overhead of torch's operations.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpu_worker.native.kernel_loading import functions, load_library

_PROBE_ROWS = 8


class FusedKernel:
    """The compiled passes. Tensors are on the CPU, float32 or bfloat16."""

    def __init__(self, library: ctypes.CDLL) -> None:
        norm_types = c_void_p, c_void_p, c_int64, c_int64, c_float, c_int32, c_void_p, c_int32
        self._rms_norm = functions(library, "rms_norm", *norm_types)
        self._gated = functions(library, "gated", c_void_p, c_void_p, c_int64, c_int32, c_void_p, c_int32)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, rounds_first: bool) -> Tensor:
        """Return x / sqrt(mean(x²) + eps) · weight over the last dim. x (..., W), weight (W,) float32.

        `rounds_first`: round the quotient to x's dtype before the product, as Llama does.
        """
        x = x if _is_dense(x) else x.contiguous()
        y = torch.empty_like(x)
        width = x.shape[-1]
        sizes = x.numel() // width, width, eps, rounds_first
        self._rms_norm[x.dtype](x.data_ptr(), weight.data_ptr(), *sizes, y.data_ptr(), torch.get_num_threads())
        return y

    def gated(self, gate: Tensor, up: Tensor, *, is_silu: bool) -> Tensor:
        """Return silu(gate) · up, or gelu(gate) · up in the tanh form. Equal shapes and dtypes, contiguous."""
        y = torch.empty_like(gate)
        pointers = gate.data_ptr(), up.data_ptr()
        self._gated[gate.dtype](*pointers, gate.numel(), is_silu, y.data_ptr(), torch.get_num_threads())
        return y


class FusedRmsNorm(nn.Module):
    """An RMSNorm. `weight` (W,) float32 is the final factor: for Gemma 1 + its parameter."""

    def __init__(self, kernel: FusedKernel, weight: Tensor, eps: float, rounds_first: bool) -> None:
        super().__init__()
        self._kernel, self._weight, self._eps, self._rounds_first = kernel, weight, eps, rounds_first

    def forward(self, x: Tensor) -> Tensor:  # (..., W) -> (..., W)
        return self._kernel.rms_norm(x, self._weight, self._eps, rounds_first=self._rounds_first)


class FusedMlp(nn.Module):
    """down(act(gate(x)) · up(x)) over the model's own linear layers."""

    def __init__(self, kernel: FusedKernel, mlp: Any, is_silu: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self._kernel, self._is_silu = kernel, is_silu

    def forward(self, x: Tensor) -> Tensor:  # (..., N, H) -> (..., N, H)
        y: Tensor = self.down_proj(self._kernel.gated(self.gate_proj(x), self.up_proj(x), is_silu=self._is_silu))
        return y


def load_fused_kernel(cache_dir: Path) -> FusedKernel | None:
    """Load the kernel, compiling it into `cache_dir` if needed. Return None, after a warning, if that fails."""
    library = load_library("fused", cache_dir)
    return None if library is None else FusedKernel(library)


@torch.inference_mode()
def fuse(model: nn.Module, kernel: FusedKernel) -> None:
    """Replace, in place, every normalisation and MLP of `model` that the kernel computes with the same result.

    Both are run on random input and compared, so other variants of a model family stay as they are.
    """
    for name, module in list(model.named_modules()):
        fused = _fused_norm(module, kernel) or _fused_mlp(module, kernel)
        if fused is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, fused)


def _fused_norm(module: Any, kernel: FusedKernel) -> nn.Module | None:
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float) or not isinstance(weight, Tensor):
        return None
    x = _probe(weight.shape[0], weight.dtype)
    plain, shifted = weight.float(), 1 + weight.float()
    candidates = [FusedRmsNorm(kernel, w, eps, first) for w in (shifted, plain) for first in (False, True)]
    return next((fused for fused in candidates if _agree(fused(x), module(x))), None)


def _fused_mlp(module: Any, kernel: FusedKernel) -> nn.Module | None:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    activation = getattr(module, "act_fn", None)
    if not all(isinstance(part, nn.Linear) for part in parts) or activation is None:
        return None
    gate_proj = module.gate_proj
    gate, up = _probe(gate_proj.out_features, gate_proj.weight.dtype, count=2)
    x = _probe(gate_proj.in_features, gate_proj.weight.dtype)
    for is_silu in (False, True):
        fused = FusedMlp(kernel, module, is_silu)
        same_values = _agree(kernel.gated(gate, up, is_silu=is_silu), activation(gate) * up)
        if same_values and _agree(
            fused(x), module(x), most_unequal=1.0
        ):  # a different rounding changes all sums slightly
            return fused
    return None


def _probe(width: int, dtype: torch.dtype, *, count: int = 0) -> Tensor:
    """Return random input (N, W), or `count` of them, with the magnitudes of activations."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, _PROBE_ROWS, width) if count else (_PROBE_ROWS, width)
    return (4 * torch.randn(shape, generator=generator)).to(dtype)


def _agree(fused: Tensor, own: Tensor, *, most_unequal: float = 0.01) -> bool:
    """Return whether both are equal up to rounding, which may change a small share of the values by about one unit."""
    fused, own = fused.float(), own.float()
    unequal = ~torch.isclose(fused, own, rtol=1e-5, atol=1e-6)
    is_close = torch.allclose(fused, own, rtol=0.01, atol=0.01 * float(own.abs().mean()))
    return is_close and float(unequal.float().mean()) <= most_unequal


def _is_dense(x: Tensor) -> bool:
    """Return whether x is contiguous in memory as (..., W), or as (tokens, heads) transposed to heads first."""
    return x.is_contiguous() or (x.dim() == 4 and x.transpose(1, 2).is_contiguous())
