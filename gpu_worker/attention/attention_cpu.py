"""Attention on the CPU. Each row has its own region; prefill chunks run one by one, decode tokens together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gpu_worker.attention.decode_attention import DecodeKernel, Decodes
from gpu_worker.step.attention_plan import AttentionPlan, Segment, check_heads

_GROUP_COST_TOKENS = 1024  # fixed cost of a group, in tokens read; measured: benchmarks/README.md


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Single-token segments of adjacent rows, read as one view. Dims: G rows, T tokens read per row. lengths (G,)."""

    tokens: slice | Tensor  # a tensor (G,) if they are not adjacent in the step
    rows: slice  # a slice, so that keys and values are views and not copies
    lengths: Tensor
    read_len: int
    _masks: dict[int | None, Tensor] = field(default_factory=dict)  # window -> bias, shared by all layers of a step

    def bias(self, sliding_window: int | None, dtype: torch.dtype) -> Tensor:
        """Return (G, 1, 1, T): 0 for visible positions, -inf past the row's length and outside the window."""
        if sliding_window not in self._masks:
            positions = torch.arange(self.read_len)
            hidden = positions >= self.lengths[:, None]
            if sliding_window is not None:
                hidden |= positions < self.lengths[:, None] - sliding_window
            bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
            self._masks[sliding_window] = bias[:, None, None, :]
        return self._masks[sliding_window]


@dataclass(frozen=True, slots=True)
class RegionAttention(AttentionPlan):
    """One step over regions. keys, values: (rows, H, T, D) per layer; token_rows, token_positions (N,)."""

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    token_rows: Tensor
    token_positions: Tensor
    prefill: tuple[Segment, ...]
    decode: tuple[DecodeGroup, ...]  # computed by torch
    compiled: tuple[DecodeKernel, Decodes] | None  # or all decode tokens by the compiled kernel

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, sliding_window: int | None
    ) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        check_heads(query, key, value, keys.shape[1], keys.shape[3])
        self._write(keys, values, key, value)
        output = query.new_empty(query.shape[1], query.shape[0], query.shape[2])  # (N, Q, D)
        for segment in self.prefill:
            chunk = query[:, segment.start : segment.end]
            output[segment.start : segment.end] = _prefill(keys, values, segment, chunk, scaling, sliding_window)
        for group in self.decode:
            output[group.tokens] = _decode(keys, values, group, query[:, group.tokens], scaling, sliding_window)
        if self.compiled is not None:
            kernel, decodes = self.compiled
            kernel.attend(decodes, query, keys, values, output, scaling=scaling, sliding_window=sliding_window)
        return output

    def _write(self, keys: Tensor, values: Tensor, key: Tensor, value: Tensor) -> None:
        if self.compiled is not None:
            kernel, _ = self.compiled
            kernel.write(key, value, self.token_rows, self.token_positions, keys, values)
        else:
            keys[self.token_rows, :, self.token_positions] = key.transpose(0, 1)
            values[self.token_rows, :, self.token_positions] = value.transpose(0, 1)


def region_attention(
    keys: Sequence[Tensor], values: Sequence[Tensor], segments: Sequence[Segment], kernel: DecodeKernel | None
) -> RegionAttention:
    """Return the plan for `segments`, which cover the step's tokens in order."""
    counts = torch.tensor([segment.num_tokens for segment in segments])
    rows = torch.tensor([segment.row for segment in segments]).repeat_interleave(counts)
    positions = torch.cat([torch.arange(segment.context_len, segment.total_len) for segment in segments])
    is_decode = [segment.num_tokens == 1 and segment.context_len > 0 for segment in segments]
    prefill = tuple(segment for segment, decodes in zip(segments, is_decode, strict=True) if not decodes)
    single = [segment for segment, decodes in zip(segments, is_decode, strict=True) if decodes]
    groups = tuple(_groups(single)) if kernel is None else ()
    compiled = None if kernel is None else (kernel, Decodes(single))
    return RegionAttention(keys, values, rows, positions, prefill, groups, compiled)


def _prefill(
    keys: Tensor, values: Tensor, segment: Segment, query: Tensor, scaling: float, sliding_window: int | None
) -> Tensor:
    """Attend one chunk to all tokens of its row. query (Q, n, D) -> (n, Q, D)."""
    end = segment.total_len
    first = 0 if sliding_window is None else max(0, segment.context_len + 1 - sliding_window)
    whole = segment.context_len == 0 and (sliding_window is None or end <= sliding_window)
    attended = scaled_dot_product_attention(
        query[None],
        keys[segment.row, :, first:end][None],
        values[segment.row, :, first:end][None],
        attn_mask=None if whole else _visible(segment, first, sliding_window),
        is_causal=whole,
        scale=scaling,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1)


def _visible(segment: Segment, first: int, sliding_window: int | None) -> Tensor:
    """Return (n, T) bool: position j is visible to position i if i - window < j <= i."""
    positions = torch.arange(segment.context_len, segment.total_len)[:, None]
    seen = torch.arange(first, segment.total_len)
    visible = seen <= positions
    if sliding_window is not None:
        visible &= seen > positions - sliding_window
    return visible


def _decode(
    keys: Tensor, values: Tensor, group: DecodeGroup, query: Tensor, scaling: float, sliding_window: int | None
) -> Tensor:
    """Attend one new token per row. query (Q, G, D) -> (G, Q, D). Grouped query heads share their keys by reshaping."""
    read_keys = keys[group.rows, :, : group.read_len]  # (G, H, T, D)
    read_values = values[group.rows, :, : group.read_len]
    num_rows, num_heads, _, head_dim = read_keys.shape
    queries = query.transpose(0, 1).reshape(num_rows, num_heads, -1, head_dim)  # (G, H, Q/H, D)
    bias = group.bias(sliding_window, query.dtype)
    attended = scaled_dot_product_attention(queries, read_keys, read_values, attn_mask=bias, scale=scaling)
    return attended.reshape(num_rows, -1, head_dim)


def _groups(segments: Sequence[Segment]) -> Iterator[DecodeGroup]:
    """Yield runs of adjacent rows. A run ends where padding to its longest row would cost more than a new group."""
    run: list[Segment] = []
    for segment in sorted(segments, key=lambda segment: segment.row):
        if run and not _belongs(segment, run):
            yield _group(run)
            run = []
        run.append(segment)
    if run:
        yield _group(run)


def _belongs(segment: Segment, run: Sequence[Segment]) -> bool:
    if segment.row != run[-1].row + 1:
        return False
    read_len = max(member.total_len for member in run)
    together = (len(run) + 1) * max(read_len, segment.total_len)
    return together <= len(run) * read_len + segment.total_len + _GROUP_COST_TOKENS


def _group(run: Sequence[Segment]) -> DecodeGroup:
    starts = [segment.start for segment in run]
    adjacent = starts == list(range(starts[0], starts[0] + len(run)))
    return DecodeGroup(
        tokens=slice(starts[0], starts[0] + len(run)) if adjacent else torch.tensor(starts),
        rows=slice(run[0].row, run[-1].row + 1),
        lengths=torch.tensor([segment.total_len for segment in run]),
        read_len=max(segment.total_len for segment in run),
    )
