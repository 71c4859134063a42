"""Keys and values in host memory: one region per row, read as a view. The kernel allocates memory on first write."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch

from gpu_worker.attention.attention_cpu import RegionAttention, region_attention
from gpu_worker.attention.decode_attention import DecodeKernel
from gpu_worker.attention.kv_cache import KvCache, KvShape
from gpu_worker.step.attention_plan import Segment

_MAP_NORESERVE = 0x4000  # Linux; the mmap module does not define it


def region_bytes(shape: KvShape) -> int:
    """Return the size of one row's region: `max_len` tokens in whole pages of the operating system."""
    return -(-shape.max_len * shape.token_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


class KvRegions(KvCache):
    """A cache with a region of `max_len` tokens for each row.

    Linux allocates memory only for tokens that have been written, so the regions together may exceed the budget of
    tokens. They are mapped without reservation, because Linux by default refuses mappings larger than its memory.
    Dims of `keys` and `values`, one tensor per layer: (rows, heads, tokens, head size).
    """

    def __init__(self, shape: KvShape, kernel: DecodeKernel | None = None) -> None:
        """Map the regions. `kernel`: computes decode tokens; without it torch does."""
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
        """Return the memory to Linux. Later reads of the region give zeros."""
        self._memory.madvise(mmap.MADV_DONTNEED, row * self._row_bytes, self._row_bytes)
