"""Read and write the safetensors format without copies: tensors are views of one buffer, a file is a list of pieces.

A file consists of the header's length (u64, little-endian), the header (JSON), and the tensors' bytes without gaps.
Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

PREFIX_BYTES = 8
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}  # in the order in which files store them
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_NAMES)}
_ALIGNMENT = 8


def tensors_in(entries: Mapping[str, Any], data: Tensor) -> dict[str, Tensor]:
    """Return each tensor of a header's `entries` as a view of `data`, the bytes after the header.

    Dims: data (N,) uint8. Raises: ValueError if a tensor contradicts its entry, or if bytes are missing or left over.
    """
    found: dict[str, Tensor] = {}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: _offsets_of(*item)):
        begin, stop = _offsets_of(name, entry)
        dtype, shape = _DTYPES.get(str(entry.get("dtype"))), entry.get("shape")
        if dtype is None or not _is_shape(shape):
            raise ValueError(f"tensor {name[:200]!r} has no valid dtype and shape")
        if begin != end or stop - begin != math.prod(shape) * dtype.itemsize or stop > len(data):
            raise ValueError(f"tensor {name[:200]!r} does not match the offsets in the header")
        part = data[begin:stop]
        part = part if begin % dtype.itemsize == 0 else part.clone()
        found[name], end = part.view(dtype).reshape(shape), stop
    if end != len(data):
        raise ValueError(f"it has {len(data)} bytes of tensors, but its header declares {end}")
    return found


def pieces_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """Yield the bytes that `safetensors.torch.save` writes for these, without copying contiguous tensors.

    `metadata` must have one item: safetensors writes several in no fixed order.
    """
    order = sorted(tensors, key=lambda name: (_RANKS[tensors[name].dtype], name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        entries[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    yield memoryview(len(header).to_bytes(PREFIX_BYTES, "little") + header)
    for name in order:
        plain = tensors[name].detach().cpu().contiguous().flatten()
        yield plain.view(torch.uint8).numpy().data


def _offsets_of(name: str, entry: Any) -> tuple[int, int]:
    match entry:
        case {"data_offsets": [int(begin), int(end)]} if 0 <= begin <= end:
            return begin, end
    raise ValueError(f"tensor {name[:200]!r} has no valid data_offsets")


def _is_shape(shape: object) -> bool:
    return isinstance(shape, list) and all(type(size) is int and 0 <= size < 2**63 for size in shape)
