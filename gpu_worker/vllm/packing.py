"""Pack a converted adapter into one buffer, to send it to vLLM's worker processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
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

    It is ("put", digest, dtype, modules, values). `modules`: (module path, rank, in, out) in the order of the buffer,
    and of fused experts their number; these are the last ones.
    `values`: for each module a (R, I), then bt (R, O), both of `dtype`; of experts a (E, R, I), then bt (E, R, O).
    """
    modules, parts = [], []
    for name, module in [*adapter.modules.items(), *adapter.experts.items()]:
        modules.append((name, module.rank, module.a.shape[-1], module.bt.shape[-1], *module.a.shape[:-2]))
        parts += [module.a.reshape(-1), module.bt.reshape(-1)]
    flat = torch.cat(parts).cpu()
    return "put", adapter.weights_digest, _NAMES[flat.dtype], modules, flat.view(torch.uint8).numpy().tobytes()


def unpacked(
    digest: str, dtype: str, modules: Sequence[Sequence[Any]], values: bytes, *, device: torch.device = _CPU
) -> DeviceAdapter:
    """Return the adapter of a buffer. Its tensors are views of one copy on the device: one transfer for all modules.

    Those of fused experts stay in host memory.
    """
    flat = torch.frombuffer(bytearray(values), dtype=_DTYPES[dtype])
    num_values = sum(rank * (num_in + num_out) for _, rank, num_in, num_out, *num in modules if not num)
    on_device, start = flat[:num_values].to(device), 0
    found: dict[str, DeviceModule] = {}
    experts: dict[str, DeviceModule] = {}

    def take(source: Tensor, *shape: int) -> Tensor:
        nonlocal start
        begin, start = start, start + math.prod(shape)
        return source[begin:start].view(shape)

    for name, rank, num_in, num_out, *num in modules:
        source, kind = (flat, experts) if num else (on_device, found)
        kind[name] = DeviceModule(take(source, *num, rank, num_in), take(source, *num, rank, num_out))
    return DeviceAdapter(digest, found, experts=experts)
