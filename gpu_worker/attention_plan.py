"""Which tokens of a packed step attend to what: prefill chunks one by one, decode tokens in groups of like length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpu_worker.kv_cache import KvCache

_SMALLEST_GROUP_LEN = 64


@dataclass(frozen=True, slots=True)
class Segment:
    """`num_tokens` adjacent tokens of one row: from token `start` of the step, position `context_len` of the row."""

    row: int
    start: int
    num_tokens: int
    context_len: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def total_len(self) -> int:
        return self.context_len + self.num_tokens


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Single-token segments read together. Dims: G rows, T tokens read of each. tokens (G,), lengths (G,)."""

    tokens: Tensor
    rows: Tensor | slice  # a slice where the rows are adjacent: a view then, not a copy
    lengths: Tensor
    read_len: int
    _masks: dict[int | None, Tensor] = field(default_factory=dict)  # by window: all layers of a step share them

    def hidden(self, sliding_window: int | None) -> Tensor:
        """(G, 1, 1, T) bool: positions a token must not see: past its row's length, or out of the window."""
        if sliding_window not in self._masks:
            positions = torch.arange(self.read_len)
            hidden = positions >= self.lengths[:, None]
            if sliding_window is not None:
                hidden |= positions < self.lengths[:, None] - sliding_window
            self._masks[sliding_window] = hidden[:, None, None, :]
        return self._masks[sliding_window]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step's attention: where tokens are written, and who reads what. token_rows, token_positions (N,)."""

    cache: KvCache
    token_rows: Tensor
    token_positions: Tensor
    prefill: tuple[Segment, ...]
    decode: tuple[DecodeGroup, ...]


def attention_plan(cache: KvCache, segments: Sequence[Segment]) -> AttentionPlan:
    """The plan for `segments`, which cover a step's tokens in order."""
    counts = torch.tensor([segment.num_tokens for segment in segments])
    rows = torch.tensor([segment.row for segment in segments]).repeat_interleave(counts)
    positions = torch.cat([torch.arange(segment.context_len, segment.total_len) for segment in segments])
    by_len: dict[int, list[Segment]] = defaultdict(list)
    prefill = []
    for segment in segments:
        if segment.num_tokens == 1 and segment.context_len > 0:
            by_len[_rounded(segment.total_len, cache.max_len)].append(segment)
        else:
            prefill.append(segment)
    decode = tuple(_group(members, read_len) for read_len, members in by_len.items())
    return AttentionPlan(cache, rows, positions, tuple(prefill), decode)


def _group(members: list[Segment], read_len: int) -> DecodeGroup:
    members = sorted(members, key=lambda segment: segment.row)
    first, last = members[0].row, members[-1].row
    adjacent = last - first + 1 == len(members)
    return DecodeGroup(
        tokens=torch.tensor([segment.start for segment in members]),
        rows=slice(first, last + 1) if adjacent else torch.tensor([segment.row for segment in members]),
        lengths=torch.tensor([segment.total_len for segment in members]),
        read_len=read_len,
    )


def _rounded(length: int, max_len: int) -> int:
    """`length` up to the next of 64, 128, 256, ..., so that a few groups hold all rows."""
    rounded = _SMALLEST_GROUP_LEN
    while rounded < length:
        rounded *= 2
    return min(rounded, max_len)
