"""Attention on a GPU over pages. torch's varlen_attn computes all rows of a step in one call per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gpu_worker.model.attention_plan import AttentionPlan, Segment, check_heads, check_window
from gpu_worker.model.transfer import to_device


class VarlenAttention(Protocol):
    """The signature of `torch.nn.attention.varlen.varlen_attn` (torch 2.13) as far as it is used here."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        *,
        scale: float | None,
        window_size: tuple[int, int],
        enable_gqa: bool,
        seqused_k: Tensor | None,
        block_table: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class DevicePages:
    """The pages of a group of layers. Dims: L layers, P tokens per page, R rows, W pages per row.

    store (L, 2, pages, P, H, D), on the device; table (R, W) int64, in host memory: the page of each block of a row.
    """

    store: Tensor
    table: Tensor
    window: int | None  # tokens that the layers see


@dataclass(frozen=True, slots=True)
class GroupStep:
    """One step over the pages of a group of layers. Dims: N tokens, B segments, W pages of the longest row.

    slots (N,): a key is in page slot // P at index slot % P. block_table (B, W) int32, as varlen_attn expects.
    """

    store: Tensor
    slots: Tensor
    block_table: Tensor
    window: int | None


@dataclass(frozen=True, slots=True)
class PagedAttention(AttentionPlan):
    """One step over pages. Dims: N tokens, B segments. layers: the group of each layer, and its index there.

    query_starts, key_starts (B + 1,), lengths (B,): int32, as varlen_attn expects. Flash attention 2 requires
    `key_starts` together with the block table but does not use it.
    """

    groups: Sequence[GroupStep]
    layers: Sequence[tuple[int, int]]
    token_positions: Tensor
    query_starts: Tensor
    key_starts: Tensor
    lengths: Tensor
    longest_query: int
    longest_key: int
    varlen_attn: VarlenAttention

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, sliding_window: int | None
    ) -> Tensor:
        place, index = self.layers[layer]
        step = self.groups[place]
        keys, values = step.store[index]
        check_heads(query, key, value, keys.shape[2], keys.shape[3])
        check_window(sliding_window, step.window)
        keys.flatten(0, 1)[step.slots] = key.transpose(0, 1)
        values.flatten(0, 1)[step.slots] = value.transpose(0, 1)
        attended = self.varlen_attn(
            query.transpose(0, 1),  # (N, Q, D)
            keys,
            values,
            self.query_starts,
            self.key_starts,
            self.longest_query,
            self.longest_key,
            scale=scaling,
            window_size=self._window_size(sliding_window),
            enable_gqa=query.shape[0] != key.shape[0],
            seqused_k=self.lengths,
            block_table=step.block_table,
        )
        assert isinstance(attended, Tensor), "varlen_attn returns a tuple only on request"
        return attended

    def _window_size(self, sliding_window: int | None) -> tuple[int, int]:
        """Return the number of earlier and later tokens that a token sees, -1 for all.

        If every row has one token, none is later. Without a bound there flash attention 2 computes the query heads of
        a key head in one block, and reads the keys once for all of them.
        """
        if sliding_window is not None:
            return sliding_window - 1, 0
        return -1, -1 if self.longest_query == 1 else 0


def paged_attention(
    groups: Sequence[DevicePages],
    layers: Sequence[tuple[int, int]],
    segments: Sequence[Segment],
    varlen_attn: VarlenAttention,
) -> PagedAttention:
    """Return the plan for `segments`, which cover the step's tokens in order."""
    device = groups[0].store.device
    counts = torch.tensor([segment.num_tokens for segment in segments])
    lengths = torch.tensor([segment.total_len for segment in segments])
    rows = torch.tensor([segment.row for segment in segments])
    positions = torch.cat([torch.arange(segment.context_len, segment.total_len) for segment in segments])
    return PagedAttention(
        groups=[_group_step(pages, rows, counts, lengths, positions) for pages in groups],
        layers=layers,
        token_positions=to_device(positions, device),
        query_starts=to_device(_starts(counts), device),
        key_starts=to_device(_starts(lengths), device),
        lengths=to_device(lengths.int(), device),
        longest_query=int(counts.max()),
        longest_key=int(lengths.max()),
        varlen_attn=varlen_attn,
    )


def _group_step(pages: DevicePages, rows: Tensor, counts: Tensor, lengths: Tensor, positions: Tensor) -> GroupStep:
    """Return the step's addresses. Blocks that a row no longer holds get the number of any page: nothing sees them."""
    page_tokens, device = pages.store.shape[3], pages.store.device
    blocks = pages.table[rows.repeat_interleave(counts), positions // page_tokens]
    slots = blocks * page_tokens + positions % page_tokens
    width = -(-int(lengths.max()) // page_tokens)
    table = pages.table[rows, :width].int()
    return GroupStep(pages.store, to_device(slots, device), to_device(table, device), pages.window)


def _starts(counts: Tensor) -> Tensor:
    """Return the start of each segment and the end: (B,) -> (B + 1,) int32."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
