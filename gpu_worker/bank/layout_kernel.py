"""Call `adapter_layout.cpp` with torch tensors."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import CDLL, c_int64, c_void_p
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.bank.bank_layout import Arrangement
from gpu_worker.native.kernels.kernel_loading import SUFFIXES, Kernel, functions
from lora_store.adapter import ModuleWeights
from lora_store.weights_blob import BlobLayout, StoredModules

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


class LayoutKernel(Kernel):
    """Copies the matrices of an adapter into their places by one call without Python's lock, on the calling thread."""

    library_name = "adapter_layout"

    def __init__(self, library: CDLL) -> None:
        self._arrange = functions(library, "arrange", c_void_p, c_int64)
        self._of_blob = lru_cache(maxsize=64)(_of_blob)  # the adapters of a pool have few different layouts

    def serves(self, dtype: torch.dtype) -> bool:
        """Return whether the kernel writes this dtype."""
        return dtype in SUFFIXES

    def __call__(self, modules: Mapping[str, ModuleWeights], arrangement: Arrangement, flat: Tensor) -> list[str]:
        """Fill the places of all modules in `flat`. Return the modules that are not finite in its dtype."""
        kept: list[Tensor] = []  # sources that exist for this call only
        if isinstance(modules, StoredModules) and modules.layout.dtypes <= SUFFIXES.keys():
            matrices: Any = self._of_blob(modules.layout, arrangement, flat.dtype).copy()
            matrices["source"] += np.uint64(modules.data.data_ptr())
        else:
            sources = {name: _Sources.of(module, kept) for name, module in modules.items()}
            matrices = _matrices(sources, arrangement, flat.dtype)
        matrices["target"] += np.uint64(flat.data_ptr())
        self._arrange[flat.dtype](matrices.ctypes.data, len(matrices))
        spoiled = np.flatnonzero(matrices["is_finite"] == 0) // 2
        names = list(modules)
        return [names[place] for place in sorted(set(spoiled.tolist()))]


class _Sources(NamedTuple):
    """The source of each matrix of a module: its address, or its offset in a blob, and whether it is bfloat16."""

    a: tuple[int, bool]
    b: tuple[int, bool]
    scaling: float

    @classmethod
    def of(cls, module: ModuleWeights, kept: list[Tensor]) -> _Sources:
        """Return the addresses, after copying matrices that the kernel cannot read to `kept`."""
        a, b = _readable(module.lora_a, kept), _readable(module.lora_b, kept)
        return cls((a.data_ptr(), a.dtype == torch.bfloat16), (b.data_ptr(), b.dtype == torch.bfloat16), module.scaling)


def _of_blob(layout: BlobLayout, arrangement: Arrangement, dtype: torch.dtype) -> NDArray[np.void]:
    """Return the matrices of all blobs with this layout. Sources and targets are offsets in bytes."""
    sources = {
        name: _Sources(
            (pair.lora_a.offset, pair.lora_a.dtype == torch.bfloat16),
            (pair.lora_b.offset, pair.lora_b.dtype == torch.bfloat16),
            pair.scaling,
        )
        for name, pair in layout.pairs.items()
    }
    return _matrices(sources, arrangement, dtype)


def _matrices(sources: Mapping[str, _Sources], arrangement: Arrangement, dtype: torch.dtype) -> NDArray[np.void]:
    """Return the A and B of each module. Targets are offsets in bytes."""
    places = arrangement.places(torch.empty(arrangement.num_values, dtype=dtype, device="meta"))
    rows = []
    for name, module in sources.items():
        rows.append(_row(module.a, places[name].a, 1.0, is_transposed=False))
        rows.append(_row(module.b, places[name].bt, module.scaling, is_transposed=True))
    return np.array(rows, _MATRIX)


def _readable(tensor: Tensor, kept: list[Tensor]) -> Tensor:
    """Return a contiguous tensor of a dtype that the kernel reads, and keep it in `kept` if it is a copy."""
    if tensor.dtype in SUFFIXES and tensor.is_contiguous():
        return tensor
    kept.append(tensor.contiguous() if tensor.dtype in SUFFIXES else tensor.float().contiguous())
    return kept[-1]


def _row(source: tuple[int, bool], target: Tensor, scaling: float, *, is_transposed: bool) -> tuple[float, ...]:
    (address, is_bf16), (rows, columns) = source, target.shape
    offset = int(target.storage_offset()) * target.itemsize
    return (address, offset, rows, columns, target.stride(0), scaling, is_bf16, is_transposed, 0)
