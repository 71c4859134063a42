"""Pack a converted adapter into one buffer, to send it to vLLM's worker processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpu_worker.bank.device_layout import DeviceAdapter, DeviceModule

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CPU = torch.device("cpu")
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
Change = tuple[Any, ...]
"""A change of the workers' banks as plain values, which vLLM's message encoder accepts."""


def packed(adapter: DeviceAdapter) -> Change:
    """Return the change that brings the adapter into the workers' banks: its tensors, copied into one buffer.

    It is ("put", digest, dtype, modules, values). `modules`: (module path, rank, in, out) in the order of the buffer.
    `values`: for each module a (R, I), then bt (R, O), both of `dtype`.
    """
    modules, parts = [], []
    for name, module in adapter.modules.items():
        modules.append((name, module.rank, module.a.shape[1], module.bt.shape[1]))
        parts += [module.a.reshape(-1), module.bt.reshape(-1)]
    flat = torch.cat(parts).cpu()
    return "put", adapter.weights_digest, _NAMES[flat.dtype], modules, flat.view(torch.uint8).numpy().tobytes()


def unpacked(
    digest: str, dtype: str, modules: list[tuple[str, int, int, int]], values: bytes, *, device: torch.device = _CPU
) -> DeviceAdapter:
    """Return the adapter of a buffer. Its tensors are views of one copy on the device: one transfer for all modules."""
    flat = torch.frombuffer(bytearray(values), dtype=_DTYPES[dtype]).to(device)
    found: dict[str, DeviceModule] = {}
    start = 0

    def take(num_rows: int, width: int) -> Tensor:
        nonlocal start
        begin, start = start, start + num_rows * width
        return flat[begin:start].view(num_rows, width)

    for name, rank, num_in, num_out in modules:
        found[name] = DeviceModule(take(rank, num_in), take(rank, num_out))
    return DeviceAdapter(digest, found)
