"""Call `adapter_layout.cpp` with torch tensors."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import CDLL, c_int64, c_void_p
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpu_worker.bank.device_layout import DeviceModule
from gpu_worker.native.kernel_loading import SUFFIXES, functions, load_library
from lora_store.adapter import ModuleWeights

_MATRIX = np.dtype(
    [
        ("source", np.uint64),
        ("target", np.uint64),
        ("rows", np.int64),
        ("columns", np.int64),
        ("stride", np.int64),
        ("scaling", np.float32),
        ("is_bf16", np.int32),
        ("is_transposed", np.int32),
        ("is_finite", np.int32),
    ]
)
"""The source's struct `Matrix`."""


class LayoutKernel:
    """Copies the matrices of an adapter into their places by one call without Python's lock, on the calling thread."""

    def __init__(self, library: CDLL) -> None:
        self._arrange = functions(library, "arrange", c_void_p, c_int64)

    def serves(self, dtype: torch.dtype) -> bool:
        """Return whether the kernel writes this dtype."""
        return dtype in SUFFIXES

    def __call__(self, weights: Mapping[str, ModuleWeights], places: Mapping[str, DeviceModule]) -> list[str]:
        """Fill the places of all modules. Return the modules that are not finite in the dtype of the places."""
        kept: list[Tensor] = []  # sources that exist for this call only
        rows = []
        for name, module in weights.items():
            place = places[name]
            rows.append(_row(_readable(module.lora_a, kept), place.a, 1.0, is_transposed=False))
            rows.append(_row(_readable(module.lora_b, kept), place.bt, module.scaling, is_transposed=True))
        matrices = np.array(rows, _MATRIX)
        dtype = next(iter(places.values())).a.dtype
        self._arrange[dtype](matrices.ctypes.data, len(matrices))
        spoiled = np.flatnonzero(matrices["is_finite"] == 0) // 2
        names = list(weights)
        return [names[place] for place in sorted(set(spoiled.tolist()))]


def load_layout_kernel(cache_dir: Path) -> LayoutKernel | None:
    """Load the kernel, compiling it into `cache_dir` if needed. Return None, after a warning, if that fails."""
    library = load_library("adapter_layout", cache_dir)
    return None if library is None else LayoutKernel(library)


def _readable(tensor: Tensor, kept: list[Tensor]) -> Tensor:
    """Return a contiguous tensor of a dtype that the kernel reads, and keep it in `kept` if it is a copy."""
    if tensor.dtype in SUFFIXES and tensor.is_contiguous():
        return tensor
    kept.append(tensor.contiguous() if tensor.dtype in SUFFIXES else tensor.float().contiguous())
    return kept[-1]


def _row(source: Tensor, target: Tensor, scaling: float, *, is_transposed: bool) -> tuple[float, ...]:
    is_bf16 = source.dtype == torch.bfloat16
    rows, columns = target.shape
    return (source.data_ptr(), target.data_ptr(), rows, columns, target.stride(0), scaling, is_bf16, is_transposed, 0)
