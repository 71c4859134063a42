"""Read and write the safetensors format without copies: tensors are views of one buffer, a file is a list of pieces.

A file consists of the header's length (u64, little-endian), the header (JSON), and the tensors' bytes without gaps.
Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PREFIX_BYTES = 8
# The largest finite number and the bytes of each dtype, in the order in which files store them.
_DTYPES = {
    "F64": (float(np.finfo(np.float64).max), 8),
    "F32": (float(np.finfo(np.float32).max), 4),
    "BF16": (float.fromhex("0x1.fep+127"), 2),
    "F16": (float(np.finfo(np.float16).max), 2),
}
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_NAMES = {f"torch.{name}": key for key, name in _TORCH_NAMES.items()} | {key: key for key in _DTYPES}
_RANKS = {name: rank for rank, name in enumerate(_DTYPES)}
_MAX_DIMS = 8  # a product of many large sizes takes minutes, in which no other thread runs
ALIGNMENT = 8
_NUMBERS_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file. Dims: data (N,) uint8, a view of the file's bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return len(self.data)

    @property
    def largest_finite(self) -> float:
        """The largest number that its dtype holds."""
        return _DTYPES[self.dtype][0]

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch  # imported here, since it takes seconds

        dtype: torch.dtype = getattr(torch, _TORCH_NAMES[self.dtype])
        return dtype

    def numbers(self) -> Iterator[NDArray[np.floating[Any]]]:
        """Yield the numbers in parts, since masks and conversions of a large tensor are large too."""
        size = _DTYPES[self.dtype][1]
        step = _NUMBERS_AT_ONCE * size
        for start in range(0, len(self.data), step):
            part = self.data[start : start + step]
            if self.dtype == "BF16":  # the upper half of a float32
                yield (part.view("<u2").astype("<u4") << 16).view("<f4")
            else:
                yield part.view(f"<f{size}")

    def without_float64(self) -> StoredTensor:
        """Return it with float64 rounded to float32, in which larger numbers are infinite."""
        if self.dtype != "F64":
            return self
        with np.errstate(over="ignore"):
            return StoredTensor("F32", self.shape, self.data.view("<f8").astype("<f4").view(np.uint8))

    def bits(self) -> NDArray[np.unsignedinteger[Any]]:
        """Return the numbers' bits in the tensor's shape, a view."""
        return self.data.view(f"<u{_DTYPES[self.dtype][1]}").reshape(self.shape)

    def with_bits(self, bits: NDArray[np.unsignedinteger[Any]]) -> StoredTensor:
        """Return a tensor of the same dtype with these bits, a copy if they are not contiguous."""
        return StoredTensor(self.dtype, bits.shape, np.ascontiguousarray(bits).reshape(-1).view(np.uint8))

    def transposed(self) -> StoredTensor:
        """Return the transposed matrix, a copy."""
        return self.with_bits(self.bits().T)

    def tensor(self) -> Tensor:
        """Return it for torch: a view of the file's bytes, or a copy where they are not aligned."""
        import torch  # imported here, since it takes seconds

        dtype = self.torch_dtype
        data = self.data if self.data.ctypes.data % dtype.itemsize == 0 else self.data.copy()
        return torch.from_numpy(data).view(dtype).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class StoredModule:
    """As `ModuleWeights`, with the tensors of a file."""

    lora_a: StoredTensor
    lora_b: StoredTensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.lora_a.shape[-2]


def tensors_in(entries: Mapping[str, Any], data: NDArray[np.uint8]) -> dict[str, StoredTensor]:
    """Return each tensor of a header's `entries` as a view of `data`, the bytes after the header.

    Dims: data (N,) uint8. Raises: ValueError if a tensor contradicts its entry, or if bytes are missing or left over.
    """
    found: dict[str, StoredTensor] = {}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: _read_offsets(*item)):
        begin, stop = _read_offsets(name, entry)
        dtype, shape = str(entry.get("dtype")), entry.get("shape")
        if dtype not in _DTYPES or not _is_shape(shape):
            raise ValueError(f"tensor {name[:200]!r} has no valid dtype and shape")
        if begin != end or stop - begin != math.prod(shape) * _DTYPES[dtype][1] or stop > len(data):
            raise ValueError(f"tensor {name[:200]!r} does not match the offsets in the header")
        found[name], end = StoredTensor(dtype, tuple(shape), data[begin:stop]), stop
    if end != len(data):
        raise ValueError(f"it has {len(data)} bytes of tensors, but its header declares {end}")
    return found


def make_pieces(tensors: Mapping[str, Tensor | StoredTensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """Yield the bytes that `safetensors.torch.save` writes for these, without copying contiguous tensors.

    `metadata` must have one item: safetensors writes several in no fixed order.
    """
    dtypes = {name: _NAMES[str(tensor.dtype)] for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (_RANKS[dtypes[name]], name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        entries[name] = {"dtype": dtypes[name], "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    yield memoryview(len(header).to_bytes(PREFIX_BYTES, "little") + header)
    for name in order:
        tensor = tensors[name]
        yield (tensor.data if isinstance(tensor, StoredTensor) else _view_bytes(tensor)).data


def _view_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    import torch  # imported here, since it takes seconds

    found: NDArray[np.uint8] = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return found


def _read_offsets(name: str, entry: Any) -> tuple[int, int]:
    match entry:
        case {"data_offsets": [int(begin), int(end)]} if 0 <= begin <= end:
            return begin, end
    raise ValueError(f"tensor {name[:200]!r} has no valid data_offsets")


def _is_shape(shape: object) -> bool:
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS:
        return False
    return all(type(size) is int and 0 <= size < 2**63 for size in shape)
