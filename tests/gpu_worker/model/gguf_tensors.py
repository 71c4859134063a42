"""Random tensors in the types of GGUF."""

from __future__ import annotations

import gguf
import numpy as np
from numpy.typing import NDArray

from gpu_worker.model.gguf_blocks import KINDS

_HALVES = {"Q4_K": (0, 2), "Q6_K": (208,)}  # where a block has its scales of 16 bits


def random_tensor(kind: str, shape: tuple[int, int], seed: int) -> NDArray[np.uint8]:
    """Return the bytes (O, bytes of an output) of a random tensor (O, I). The package gguf cannot make all types."""
    random, type_ = np.random.default_rng(seed), gguf.GGMLQuantizationType[kind]
    if kind not in _HALVES:
        return gguf.quants.quantize((random.normal(size=shape) / 8).astype(np.float32), type_)
    blocks = random.integers(256, size=(shape[0], shape[1] // 256, KINDS[kind].block_bytes), dtype=np.uint8)
    for place in _HALVES[kind]:
        scales = (random.uniform(0.5, 1, size=blocks.shape[:2]) / 4096).astype(np.float16)
        blocks[..., place : place + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)
