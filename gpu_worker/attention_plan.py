"""Which tokens of a packed step attend to what: prefill chunks one by one, decode tokens in groups of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpu_worker.kv_cache import KvCache

_GROUP_COST_TOKENS = 1024  # a group takes as long as this many more tokens of one row, measured: benchmarks/README.md


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
    """Single-token segments of adjacent rows, read together. Dims: G rows, T tokens read of each. lengths (G,)."""

    tokens: slice | Tensor  # (G,) where they are not adjacent in the step
    rows: slice  # never gathered: a view, not a copy
    lengths: Tensor
    read_len: int
    _masks: dict[int | None, Tensor] = field(default_factory=dict)  # by window: all layers of a step share them

    def bias(self, sliding_window: int | None, dtype: torch.dtype) -> Tensor:
        """(G, 1, 1, T): 0, and -inf where a token must not see: past its row's length, or out of the window."""
        if sliding_window not in self._masks:
            positions = torch.arange(self.read_len)
            hidden = positions >= self.lengths[:, None]
            if sliding_window is not None:
                hidden |= positions < self.lengths[:, None] - sliding_window
            bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
            self._masks[sliding_window] = bias[:, None, None, :]
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
    is_decode = [segment.num_tokens == 1 and segment.context_len > 0 for segment in segments]
    prefill = tuple(segment for segment, decodes in zip(segments, is_decode, strict=True) if not decodes)
    decode = tuple(_groups([segment for segment, decodes in zip(segments, is_decode, strict=True) if decodes]))
    return AttentionPlan(cache, rows, positions, prefill, decode)


def _groups(segments: Sequence[Segment]) -> Iterator[DecodeGroup]:
    """Runs of adjacent rows. A run goes on while what it reads past its rows' lengths costs less than a new group."""
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
