"""Training batches as one row: the prompts' common prefix once, then the rest of every example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.training.lora_training import Batch, Example


class Packed:
    """Examples in one row of T tokens. Their common first tokens are computed once.

    A token attends to the common part and to its own example up to itself, as if its example were alone.
    """

    def __init__(self, examples: Sequence[Example], config: Any) -> None:
        """Set up the layout. `config`: the base model's, for its layer types and sliding window."""
        self.prefix_len = common_len([example.ids for example in examples])
        self._layer_types = sorted(set(config.layer_types))
        self._window = config.sliding_window

    def num_tokens(self, examples: Sequence[Example]) -> int:
        return self.prefix_len + sum(len(example.ids) - self.prefix_len for example in examples)

    def batch(self, examples: Sequence[Example]) -> Batch:
        p = self.prefix_len
        first = examples[0]
        ids = torch.cat([first.ids[:p], *[e.ids[p:] for e in examples]])
        labels = torch.cat([first.labels[:p], *[e.labels[p:] for e in examples]])
        lengths = [p, *[len(e.ids) - p for e in examples]]
        positions = torch.cat([torch.arange(p), *[torch.arange(p, len(e.ids)) for e in examples]])
        owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))  # (T,), 0 the common part
        inputs = {"position_ids": positions[None], "attention_mask": self._masks(owner, positions)}
        return Batch(ids[None], labels[None], inputs)

    def _masks(self, owner: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Return, by layer type, (1, 1, T, T): whether the query of a row may attend to the key of a column."""
        is_before = torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
        full = is_before & ((owner[None] == 0) | (owner[None] == owner[:, None]))
        near = full & (positions[:, None] - positions[None] < self._window)
        masks = {"full_attention": full, "sliding_attention": near}
        return {kind: masks[kind][None, None] for kind in self._layer_types}


def common_len(rows: Sequence[Tensor]) -> int:
    """Return the number of first ids that all rows share, at most all but the last of the shortest row."""
    shortest = min(map(len, rows)) - 1
    stacked = torch.stack([row[:shortest] for row in rows])
    differs = (stacked != stacked[0]).any(dim=0).nonzero()
    return int(differs[0]) if len(differs) else shortest
