"""Attention on the CPU over pages in host memory. Long chunks of prompts run one by one, all other tokens together.

The compiled kernel computes a short chunk as decode tokens: each of them has the result that it would have in a step of
its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gpu_worker.model.attention_plan import AttentionPlan, Segment, check_heads, check_window
from gpu_worker.native.attention.decode_attention import DecodeArguments, DecodeKernel, Decodes

_GROUP_COST_TOKENS = 1024  # fixed cost of a group, in tokens read; measured: docs/benchmarks/index.md
_GUESSES = 8  # tokens of a row with guesses, at most
# Sums over a chunk's tokens of the keys that each reads. Measured: docs/benchmarks/index.md, "Attention".
_MOST_READS = 8192  # for a whole prompt
_MOST_READS_BEHIND = 24576  # for a chunk behind other tokens, where torch is slower


@dataclass(frozen=True, slots=True)
class HostPages:
    """The pages of a group of layers, which see `window` tokens. Dims: R rows, W pages per row, P tokens per page.

    table (R, W) int64: the page of each block of a row. Slot s is token s % P of page s // P.
    """

    table: Tensor
    page_tokens: int
    window: int | None

    def slots(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Return the slots of these tokens. rows and positions broadcast to the result's shape."""
        places = positions.numpy()
        pages = self.table.numpy()[rows.numpy(), places // self.page_tokens]
        return torch.from_numpy(np.asarray(pages * self.page_tokens + places % self.page_tokens))

    def span(self, row: int, first: int, end: int) -> slice | Tensor:
        """Return the slots of a row's tokens, as a slice if its pages are adjacent: then reading makes no copy."""
        start = first // self.page_tokens
        pages = self.table[row, start : -(-end // self.page_tokens)]
        if len(pages) == 1 or bool((pages.diff() == 1).all()):
            offset = (int(pages[0]) - start) * self.page_tokens
            return slice(offset + first, offset + end)
        return self.slots(torch.tensor(row), torch.arange(first, end))


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Single-token segments that are read together, padded to the longest. Dims: G rows. tokens, rows, lengths (G,)."""

    tokens: Tensor
    rows: Tensor
    lengths: Tensor
    read_len: int

    def visible(self, pages: HostPages, sliding_window: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the slots of the last T tokens of each row (G, T), and a bias (G, 1, 1, T): -inf for padding.

        Padding is the row's own first token, so no values of other rows are read.
        """
        num_read = self.read_len if sliding_window is None else min(self.read_len, sliding_window)
        positions = self.lengths[:, None] - num_read + torch.arange(num_read)
        bias = torch.zeros(positions.shape, dtype=dtype).masked_fill_(positions < 0, float("-inf"))
        return pages.slots(self.rows[:, None], positions.clamp(min=0)), bias[:, None, None, :]


@dataclass(frozen=True, slots=True)
class GroupStep:
    """One step over the pages of a group of layers. slots (N,): where the step's tokens are stored.

    `spans`, `reads` and `calls` are computed by the first layer and shared by the others.
    """

    pages: HostPages
    slots: Tensor
    spans: dict[tuple[int, int], slice | Tensor] = field(default_factory=dict)
    reads: dict[tuple[int, int | None], tuple[Tensor, Tensor]] = field(default_factory=dict)
    calls: dict[tuple[int, float, int | None], DecodeArguments] = field(default_factory=dict)

    def span(self, segment: Segment, first: int) -> slice | Tensor:
        """Return the slots of the segment's row from position `first` to the segment's end."""
        found = self.spans.get((segment.row, first))
        if found is None:
            found = self.spans[segment.row, first] = self.pages.span(segment.row, first, segment.total_len)
        return found

    def read(
        self, index: int, group: DecodeGroup, sliding_window: int | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return `group.visible`. index: the group's place in the step."""
        found = self.reads.get((index, sliding_window))
        if found is None:
            found = self.reads[index, sliding_window] = group.visible(self.pages, sliding_window, dtype)
        return found


@dataclass(frozen=True, slots=True)
class HostAttention(AttentionPlan):
    """One step over pages in host memory. keys and values, per layer: (H, S, D). groups: the group of each layer."""

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    groups: Sequence[GroupStep]
    token_positions: Tensor  # (N,)
    prefill: tuple[Segment, ...]
    decode: tuple[DecodeGroup, ...]  # computed by torch
    compiled: tuple[DecodeKernel, Decodes] | None  # or all decode tokens by the compiled kernel

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, sliding_window: int | None
    ) -> Tensor:
        step, keys, values = self.groups[layer], self.keys[layer], self.values[layer]
        check_heads(query, key, value, keys.shape[0], keys.shape[2])
        check_window(sliding_window, step.pages.window)
        self._write(step, keys, values, key, value)
        output = query.new_empty(query.shape[1], query.shape[0], query.shape[2])  # (N, Q, D)
        for segment in self.prefill:
            chunk = query[:, segment.start : segment.end]
            output[segment.start : segment.end] = _prefill(keys, values, step, segment, chunk, scaling, sliding_window)
        for number, group in enumerate(self.decode):
            slots, bias = step.read(number, group, sliding_window, query.dtype)
            output[group.tokens] = _decode(keys, values, slots, bias, query[:, group.tokens], scaling)
        if self.compiled is not None:
            kernel, decodes = self.compiled
            table = step.pages.table, step.pages.page_tokens
            kernel.attend(decodes, query, keys, values, output, table, scaling=scaling, sliding_window=sliding_window)
        return output

    @property
    def is_compiled(self) -> bool:
        """Return whether the compiled kernel computes all tokens of the step."""
        return self.compiled is not None and not self.prefill

    def decode_arguments(
        self, layer: int, num_query_heads: int, *, scaling: float, sliding_window: int | None
    ) -> DecodeArguments:
        """Return the kernel's arguments for a layer, if `is_compiled`. The caller writes the keys first, to `slots`."""
        assert self.compiled is not None, "the step is not compiled"
        step = self.groups[layer]
        check_window(sliding_window, step.pages.window)
        key = num_query_heads, scaling, sliding_window
        found = step.calls.get(key)
        if found is None:
            table = step.pages.table, step.pages.page_tokens
            found = self.compiled[1].arguments(num_query_heads, table, scaling=scaling, sliding_window=sliding_window)
            step.calls[key] = found
        return found

    def _write(self, step: GroupStep, keys: Tensor, values: Tensor, key: Tensor, value: Tensor) -> None:
        if self.compiled is not None:
            kernel, _ = self.compiled
            kernel.write(key, value, step.slots, keys, values)
        else:
            keys[:, step.slots], values[:, step.slots] = key, value


def host_attention(
    stored: tuple[Sequence[Tensor], Sequence[Tensor]],
    groups: Sequence[HostPages],
    group_of: Sequence[int],
    segments: Sequence[Segment],
    kernel: DecodeKernel | None,
) -> HostAttention:
    """Return the plan for `segments`, which cover the step's tokens in order.

    stored: keys and values of each layer (H, S, D). group_of: the index of each layer's group.
    """
    rows, positions = _tokens(segments)
    is_decode = [_is_single(segment) if kernel is None else _is_short(segment) for segment in segments]
    prefill = tuple(segment for segment, decodes in zip(segments, is_decode, strict=True) if not decodes)
    short = [segment for segment, decodes in zip(segments, is_decode, strict=True) if decodes]
    single = [token for segment in short for token in _split_tokens(segment)]
    steps = [GroupStep(pages, pages.slots(rows, positions)) for pages in groups]
    return HostAttention(
        *stored,
        groups=[steps[index] for index in group_of],
        token_positions=positions,
        prefill=prefill,
        decode=tuple(_groups(single)) if kernel is None else (),
        compiled=None if kernel is None else (kernel, Decodes(single)),
    )


def _tokens(segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
    """Return the row of each token of the step, and its position there, with few operations, since they cost most."""
    if all(segment.num_tokens == 1 for segment in segments):
        numbers = [segment.row for segment in segments], [segment.context_len for segment in segments]
        rows, positions = torch.tensor(numbers, dtype=torch.long)
        return rows, positions
    counts = np.array([segment.num_tokens for segment in segments])
    rows_of_tokens = np.array([segment.row for segment in segments]).repeat(counts)
    offsets = np.array([segment.context_len - segment.start for segment in segments]).repeat(counts)
    return torch.from_numpy(rows_of_tokens), torch.from_numpy(offsets + np.arange(len(offsets)))


def _is_single(segment: Segment) -> bool:
    return segment.num_tokens == 1 and segment.context_len > 0


def _is_short(segment: Segment) -> bool:
    """Return whether the compiled kernel, which reads all keys again for each token, is faster than torch."""
    num_reads = segment.num_tokens * (segment.context_len + (segment.num_tokens + 1) / 2)
    if segment.context_len == 0:
        return num_reads <= _MOST_READS
    return num_reads <= _MOST_READS_BEHIND or segment.num_tokens <= _GUESSES


def _split_tokens(segment: Segment) -> Iterator[Segment]:
    """Yield a segment for each token."""
    if segment.num_tokens == 1:
        yield segment
        return
    for place in range(segment.num_tokens):
        yield replace(segment, start=segment.start + place, num_tokens=1, context_len=segment.context_len + place)


def _prefill(
    keys: Tensor,
    values: Tensor,
    step: GroupStep,
    segment: Segment,
    query: Tensor,
    scaling: float,
    sliding_window: int | None,
) -> Tensor:
    """Attend one chunk to all visible tokens of its row. query (Q, n, D) -> (n, Q, D)."""
    end = segment.total_len
    first = 0 if sliding_window is None else max(0, segment.context_len + 1 - sliding_window)
    whole = segment.context_len == 0 and (sliding_window is None or end <= sliding_window)
    span = step.span(segment, first)
    attended = scaled_dot_product_attention(
        query[None],
        keys[:, span][None],
        values[:, span][None],
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


def _decode(keys: Tensor, values: Tensor, slots: Tensor, bias: Tensor, query: Tensor, scaling: float) -> Tensor:
    """Attend one new token per row. query (Q, G, D), slots (G, T), bias (G, 1, 1, T) -> (G, Q, D).

    Grouped query heads share their keys by reshaping.
    """
    read_keys, read_values = (stored[:, slots].transpose(0, 1) for stored in (keys, values))  # (G, H, T, D)
    num_rows, num_heads, _, head_dim = read_keys.shape
    queries = query.transpose(0, 1).reshape(num_rows, num_heads, -1, head_dim)  # (G, H, Q/H, D)
    attended = scaled_dot_product_attention(queries, read_keys, read_values, attn_mask=bias, scale=scaling)
    return attended.reshape(num_rows, -1, head_dim)


def _groups(segments: Sequence[Segment]) -> Iterator[DecodeGroup]:
    """Yield runs of like lengths. A run ends where padding to its longest row would cost more than a new group."""
    run: list[Segment] = []
    num_padding = 0
    for segment in sorted(segments, key=lambda segment: -segment.total_len):
        num_padding += run[0].total_len - segment.total_len if run else 0
        if num_padding > _GROUP_COST_TOKENS:
            yield _group(run)
            run, num_padding = [], 0
        run.append(segment)
    if run:
        yield _group(run)


def _group(run: Sequence[Segment]) -> DecodeGroup:
    return DecodeGroup(
        tokens=torch.tensor([segment.start for segment in run]),
        rows=torch.tensor([segment.row for segment in run]),
        lengths=torch.tensor([segment.total_len for segment in run]),
        read_len=run[0].total_len,
    )
