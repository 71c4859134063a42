"""Attention on a GPU over pages. torch's varlen_attn computes all rows of a step in one call per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gpu_worker.device.transfer import to_device
from gpu_worker.step.attention_plan import AttentionPlan, Segment, check_heads


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
class PagedAttention(AttentionPlan):
    """One step over pages. Dims: N tokens, B segments, W pages of the longest row, P tokens per page.

    store (layers, 2, pages, P, H, D); token_positions, slots (N,): a key is in page slot // P at index slot % P.
    query_starts, key_starts (B + 1,), lengths (B,), block_table (B, W): int32, as varlen_attn expects. Flash attention
    2 requires `key_starts` together with the block table but does not use it.
    """

    store: Tensor
    token_positions: Tensor
    slots: Tensor
    query_starts: Tensor
    key_starts: Tensor
    lengths: Tensor
    block_table: Tensor
    longest_query: int
    longest_key: int
    varlen_attn: VarlenAttention

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, sliding_window: int | None
    ) -> Tensor:
        keys, values = self.store[layer]
        check_heads(query, key, value, keys.shape[2], keys.shape[3])
        keys.flatten(0, 1)[self.slots] = key.transpose(0, 1)
        values.flatten(0, 1)[self.slots] = value.transpose(0, 1)
        attended = self.varlen_attn(
            query.transpose(0, 1),  # (N, Q, D)
            keys,
            values,
            self.query_starts,
            self.key_starts,
            self.longest_query,
            self.longest_key,
            scale=scaling,
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),  # number of earlier tokens
            enable_gqa=query.shape[0] != key.shape[0],
            seqused_k=self.lengths,
            block_table=self.block_table,
        )
        assert isinstance(attended, Tensor), "varlen_attn returns a tuple only on request"
        return attended


def paged_attention(
    store: Tensor, tables: Sequence[Sequence[int]], segments: Sequence[Segment], varlen_attn: VarlenAttention
) -> PagedAttention:
    """Return the plan for `segments`, which cover the step's tokens in order. `tables`: page ids per segment's row."""
    page_tokens = store.shape[3]
    counts = torch.tensor([segment.num_tokens for segment in segments])
    lengths = torch.tensor([segment.total_len for segment in segments])
    table = pad_sequence([torch.tensor(pages) for pages in tables], batch_first=True)  # (B, W); padding is never read
    positions = torch.cat([torch.arange(segment.context_len, segment.total_len) for segment in segments])
    places = torch.arange(len(segments)).repeat_interleave(counts)
    slots = table[places, positions // page_tokens] * page_tokens + positions % page_tokens
    return PagedAttention(
        store=store,
        token_positions=to_device(positions, store.device),
        slots=to_device(slots, store.device),
        query_starts=to_device(_starts(counts), store.device),
        key_starts=to_device(_starts(lengths), store.device),
        lengths=to_device(lengths.int(), store.device),
        block_table=to_device(table.int(), store.device),
        longest_query=int(counts.max()),
        longest_key=int(lengths.max()),
        varlen_attn=varlen_attn,
    )


def _starts(counts: Tensor) -> Tensor:
    """Return the start of each segment and the end: (B,) -> (B + 1,) int32."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
