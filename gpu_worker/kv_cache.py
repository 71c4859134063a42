"""Keys and values of running rows: one preallocated region a row."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor


class KvCache:
    """Dims: L layers, B rows, H key/value heads, T tokens, D head size. keys[l], values[l] (B, H, T, D).

    A region is zeroed when its row is freed: tokens past a row's length are masked, but masked NaN would still spread.
    """

    def __init__(
        self, *, num_layers: int, num_rows: int, num_heads: int, max_len: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        shape = (num_rows, num_heads, max_len, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype) for _ in range(num_layers)]
        self.max_len = max_len
        self._free = list(range(num_rows))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def allocate(self) -> int:
        """The lowest free row, so that running rows stay adjacent."""
        return heapq.heappop(self._free)

    def free(self, row: int, used_tokens: int) -> None:
        """Give `row` back; its first `used_tokens` tokens are wiped."""
        for cache in (*self.keys, *self.values):
            cache[row, :, :used_tokens] = 0
        heapq.heappush(self._free, row)

    def write(self, layer: int, rows: Tensor, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Store one step's tokens. rows, positions (N,); key, value (H, N, D)."""
        self.keys[layer][rows, :, positions] = key.transpose(0, 1)
        self.values[layer][rows, :, positions] = value.transpose(0, 1)
