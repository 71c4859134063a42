"""Read the integers of the quantised tensors of a GGUF file.

Source: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h, the structs of blocks.
Dims: O out, I in, B blocks of an output, of 32 or 256 inputs, G groups of an output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_worker.model.quantization import GROUP, SMALL_GROUP, QuantizedWeight, round_to_halves

Bytes = NDArray[np.uint8]
_Parts = tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]
"""Integers (O, B, inputs), scales (O, B, groups), and offsets, or None."""


def _read_8(blocks: Bytes) -> _Parts:
    return blocks[..., 2:].view(np.int8), _halves(blocks[..., :2]), None


def _read_4(blocks: Bytes) -> _Parts:
    return _nibbles(blocks[..., 2:]) - np.int8(8), _halves(blocks[..., :2]), None


def _read_5(blocks: Bytes) -> _Parts:
    fifth_bits = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little").astype(np.int8)
    return (_nibbles(blocks[..., 6:]) | fifth_bits << 4) - np.int8(16), _halves(blocks[..., :2]), None


def _read_4_k(blocks: Bytes) -> _Parts:
    """8 groups, with scales and minima of 6 bits: of the last four groups, two bits of each are with the first four."""
    low, middle, high = (blocks[..., start : start + 4] for start in (4, 8, 12))
    sizes = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=-1)
    minima = np.concatenate([middle & 63, high >> 4 | middle >> 6 << 4], axis=-1)
    scales = _halves(blocks[..., :2]) * sizes
    values = blocks[..., 16:].reshape(*blocks.shape[:2], 4, GROUP)
    pairs = np.stack([values & 15, values >> 4], axis=-2).reshape(*blocks.shape[:2], -1)
    return pairs.astype(np.int8) - np.int8(8), scales, 8 * scales - _halves(blocks[..., 2:4]) * minima


def _read_6_k(blocks: Bytes) -> _Parts:
    """16 groups. Halves of 128 inputs have their lower 4 bits in 64 bytes, and their upper 2 bits in 32."""
    low = blocks[..., :128].reshape(*blocks.shape[:2], 2, 64)
    high = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 32)
    lower = np.stack([low & 15, low >> 4], axis=-2).reshape(*blocks.shape[:2], 2, 4, 32)
    upper = np.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=-2)
    values = (lower | upper << 4).astype(np.int8).reshape(*blocks.shape[:2], -1) - np.int8(32)
    return values, _halves(blocks[..., 208:]) * np.ascontiguousarray(blocks[..., 192:208]).view(np.int8), None


def _halves(data: Bytes) -> NDArray[np.float32]:
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def _nibbles(data: Bytes) -> NDArray[np.int8]:
    """Return the lower halves of the bytes, then the upper ones."""
    return np.concatenate([data & 15, data >> 4], axis=-1).astype(np.int8)


@dataclass(frozen=True, slots=True)
class _Kind:
    block_bytes: int
    read: Callable[[Bytes], _Parts]
    bits: int = 8  # in which the integers are kept
    group: int = GROUP


KINDS: Mapping[str, _Kind] = {
    "Q8_0": _Kind(34, _read_8),
    "Q5_0": _Kind(22, _read_5),
    "Q4_0": _Kind(18, _read_4, bits=4),
    "Q4_K": _Kind(144, _read_4_k, bits=4),
    "Q6_K": _Kind(210, _read_6_k, group=SMALL_GROUP),
}


def read_integers(kind: str, data: Bytes) -> QuantizedWeight:
    """Return the weight (O, I) of a tensor's bytes (O, bytes of an output).

    The integers are the file's. Scales and offsets of Q4_K and Q6_K are rounded to 11 bits; those of the others have
    as many.
    """
    form = KINDS[kind]
    blocks = np.ascontiguousarray(data).reshape(len(data), -1, form.block_bytes)
    values, *of_groups = form.read(blocks)
    scales, offsets = (None if part is None else _rounded(part) for part in of_groups)
    assert scales is not None, "every kind has scales"
    whole = torch.from_numpy(np.ascontiguousarray(values).reshape(len(data), -1))
    return QuantizedWeight(whole, scales, form.bits, form.group, offsets)


def _rounded(of_groups: NDArray[Any]) -> torch.Tensor:
    return round_to_halves(torch.from_numpy(of_groups.reshape(len(of_groups), -1)))
