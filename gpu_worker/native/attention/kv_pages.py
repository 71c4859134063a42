"""The memory of keys and values: pages on a GPU, and pages in host memory."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch.nn.attention.varlen import varlen_attn

from gpu_worker.bank.device_memory import use_huge_pages
from gpu_worker.model.attention_plan import Segment
from gpu_worker.native.attention.attention_cpu import HostAttention, HostPages, host_attention
from gpu_worker.native.attention.attention_cuda import DevicePages, PagedAttention, VarlenAttention, paged_attention
from gpu_worker.native.attention.decode_attention import DecodeKernel
from gpu_worker.native.attention.kv_cache import KvCache, KvShape

_MAP_NORESERVE = 0x4000  # Linux; the mmap module does not define it


class DeviceKvCache(KvCache):
    """Pages on a GPU. `attend`: the attention function over pages. Dims of a group: (layers, 2, pages, P, H, D)."""

    def __init__(self, shape: KvShape, device: torch.device, attend: VarlenAttention = varlen_attn) -> None:
        super().__init__(shape)
        self._attend = attend
        sizes = (shape.page_tokens, shape.num_heads, shape.head_dim)
        self.stores = [
            torch.zeros((len(group.layers), 2, group.num_pages, *sizes), dtype=shape.dtype, device=device)
            for group in shape.groups
        ]
        self._layers = _places(shape)

    def release(self) -> None:
        """Do nothing: the memory is the GPU's."""

    def _attention(self, segments: Sequence[Segment]) -> PagedAttention:
        groups = [DevicePages(store, of.table, of.seen) for store, of in zip(self.stores, self._groups, strict=True)]
        return paged_attention(groups, self._layers, segments, self._attend)

    def _wipe(self, group: int, pages: Sequence[int]) -> None:
        self.stores[group][:, :, list(pages)] = 0


class HostKvCache(KvCache):
    """Pages in host memory. Dims of a group: (layers, 2, H, pages, P, D), so that adjacent pages are adjacent tokens.

    keys and values, one tensor per layer: (H, slots, D).

    Linux allocates the memory when it is first written. It is mapped without reservation, because Linux by default
    refuses mappings that are larger than its free memory.
    """

    def __init__(self, shape: KvShape, kernel: DecodeKernel | None = None) -> None:
        """Map the pages. `kernel`: computes decode tokens; without it torch does."""
        super().__init__(shape)
        self._kernel = kernel
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._memory = mmap.mmap(-1, shape.num_bytes, flags=flags)
        use_huge_pages(self._memory)
        values = torch.frombuffer(self._memory, dtype=shape.dtype)
        sizes = [
            (len(group.layers), 2, shape.num_heads, group.num_pages, shape.page_tokens, shape.head_dim)
            for group in shape.groups
        ]
        parts = torch.split(values, [math.prod(size) for size in sizes])
        self.stores = [part.view(size) for part, size in zip(parts, sizes, strict=True)]
        places = _places(shape)
        slots = [store.flatten(3, 4) for store in self.stores]
        self.keys = [slots[group][index, 0] for group, index in places]
        self.values = [slots[group][index, 1] for group, index in places]
        self._group_of = [group for group, _ in places]
        self._pages = [HostPages(of.table, shape.page_tokens, of.seen) for of in self._groups]

    def release(self) -> None:
        self._memory.madvise(mmap.MADV_DONTNEED)

    def _attention(self, segments: Sequence[Segment]) -> HostAttention:
        return host_attention((self.keys, self.values), self._pages, self._group_of, segments, self._kernel)

    def _wipe(self, group: int, pages: Sequence[int]) -> None:
        self.stores[group].index_fill_(3, torch.tensor(pages), 0)


def _places(shape: KvShape) -> list[tuple[int, int]]:
    """Return the group of each layer, and its index there."""
    places = {layer: (i, j) for i, group in enumerate(shape.groups) for j, layer in enumerate(group.layers)}
    return [places[layer] for layer in range(shape.num_layers)]
