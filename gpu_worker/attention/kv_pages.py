"""Keys and values on a GPU: one pool of pages, addressed through block tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.attention.varlen import varlen_attn

from gpu_worker.attention.attention_cuda import PagedAttention, VarlenAttention, paged_attention
from gpu_worker.attention.kv_cache import KvCache, KvShape
from gpu_worker.step.attention_plan import Segment


class KvPages(KvCache):
    """A paged cache on a GPU. `attend`: the attention function over pages."""

    def __init__(self, shape: KvShape, device: torch.device, attend: VarlenAttention = varlen_attn) -> None:
        super().__init__(shape)
        self._device, self._attend = device, attend
        size = (shape.num_layers, 2, shape.num_pages, shape.page_tokens, shape.num_heads, shape.head_dim)
        self._store = torch.zeros(size, dtype=shape.dtype, device=device)

    def attention(self, segments: Sequence[Segment]) -> PagedAttention:
        tables = [self._pages[segment.row] for segment in segments]
        return paged_attention(self._store, tables, segments, self._attend)

    def _wipe(self, row: int, pages: Sequence[int]) -> None:
        self._store[:, :, list(pages)] = 0
