"""Keys and values in host memory: a region a row, read as a view. Its pages are the operating system's as well."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch

from gpu_worker.attention.attention_cpu import RegionAttention, region_attention
from gpu_worker.attention.decode_attention import DecodeKernel
from gpu_worker.attention.kv_cache import KvCache, KvShape
from gpu_worker.step.attention_plan import Segment

_MAP_NORESERVE = 0x4000  # of Linux; the mmap module has no name for it


def region_bytes(shape: KvShape) -> int:
    """Return the size of one row's region: `max_len` tokens in whole pages of the operating system."""
    return -(-shape.max_len * shape.token_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


class KvRegions(KvCache):
    """A region for each row, which could hold `max_len` tokens; memory is taken only where tokens have been written.

    So the budget counts tokens, and what rows may hold together is less than their regions would. The regions are
    address space that Linux does not charge: by default it refuses a mapping larger than the machine's memory.
    Dims of `keys` and `values`, one tensor a layer: (rows, heads, tokens, head size).
    """

    def __init__(self, shape: KvShape, kernel: DecodeKernel | None = None) -> None:
        """`kernel`: what decode tokens are attended by; without it through torch."""
        super().__init__(shape)
        self._kernel = kernel
        num_values = shape.max_len * shape.token_bytes // shape.dtype.itemsize
        self._row_bytes = region_bytes(shape)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._memory = mmap.mmap(-1, shape.num_rows * self._row_bytes, flags=flags)
        rows = torch.frombuffer(self._memory, dtype=shape.dtype).view(shape.num_rows, -1)[:, :num_values]
        split = rows.view(shape.num_rows, shape.num_layers, 2, shape.num_heads, shape.max_len, shape.head_dim)
        self.keys, self.values = list(split[:, :, 0].unbind(1)), list(split[:, :, 1].unbind(1))

    def attention(self, segments: Sequence[Segment]) -> RegionAttention:
        return region_attention(self.keys, self.values, segments, self._kernel)

    def _wipe(self, row: int, pages: Sequence[int]) -> None:
        """Linux gives the memory back, and zeros to whoever reads there again."""
        self._memory.madvise(mmap.MADV_DONTNEED, row * self._row_bytes, self._row_bytes)
