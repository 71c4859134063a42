"""Compute the output head only where a row's mask allows ids."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gpu_worker.front.grammar.state import BITS, only_id
from gpu_worker.model.packed_linear import PANEL, KernelLinear, PackedLinear
from gpu_worker.model.step_context import StepContext


class OutputHead(nn.Module):
    """A model's output head on the CPU. A row whose mask allows few ids gets -inf for the others.

    The compiled kernel computes only the panels that contain allowed ids, if that is cheaper: their logits are those of
    the whole head, bit for bit. An id that is the only one needs no logit on any head, and gets 0. A row that is not
    finite gets all its logits, so that it stays unsound.
    """

    def __init__(self, whole: nn.Linear | KernelLinear | PackedLinear, step: StepContext) -> None:
        super().__init__()
        self.whole, self._step = whole, step

    @property
    def bias(self) -> Tensor | None:
        """Return the head's bias, which some models read as they take a head."""
        bias: Tensor | None = getattr(self.whole, "bias", None)  # a packed head adds its own
        return bias

    def forward(self, x: Tensor) -> Tensor:  # (..., K, I) -> (..., K, V)
        masks = {row: mask for row, mask in enumerate(self._step.masks()) if mask is not None}
        if not masks:
            y: Tensor = self.whole(x)
            return y
        rows = x.reshape(-1, x.shape[-1])
        is_finite = rows.isfinite().all(dim=-1).tolist()
        masks = {row: mask for row, mask in masks.items() if is_finite[row]}
        only = {row: token for row, mask in masks.items() if (token := only_id(mask)) is not None}
        if isinstance(self.whole, KernelLinear):
            panels = {row: np.flatnonzero(() if row in only else mask) for row, mask in masks.items()}
            y = self._in_parts(self.whole, rows, panels)
        elif len(only) == len(rows):
            y = rows.new_full((len(rows), self.whole.out_features), -torch.inf)
        else:
            y = self.whole(rows)
        for row, token in only.items():
            y[row, token] = 0.0
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def _in_parts(whole: KernelLinear, rows: Tensor, panels: Mapping[int, NDArray[np.int64]]) -> Tensor:
        assert PANEL == BITS, "a panel has the ids of one word of a mask"
        counts = {row: len(found) for row, found in panels.items()}
        limited = rows_in_parts(counts, len(rows), -(-whole.out_features // PANEL), whole.rows_per_read)
        if not limited:
            y: Tensor = whole(rows)
            return y
        owners = np.repeat(limited, [counts[row] for row in limited])
        parts = np.stack([np.concatenate([panels[row] for row in limited]), owners], axis=1).astype(np.int32)
        others = np.setdiff1d(np.arange(len(rows)), limited).astype(np.int32)
        return whole.some(rows, others, parts[parts[:, 0].argsort(kind="stable")])


def rows_in_parts(num_panels: Mapping[int, int], num_rows: int, all_panels: int, rows_per_read: int) -> list[int]:
    """Return the rows to compute panel by panel, so that the step's head costs least.

    A panel for one row costs 1. The whole head costs `all_panels` for up to `rows_per_read` rows, and for more in
    proportion.
    `num_panels`: those of the rows with a mask; `num_rows`: all rows.
    """
    order = sorted(num_panels, key=num_panels.__getitem__)
    costs, parts = [], 0.0
    for place in range(len(order) + 1):
        left = num_rows - place
        costs.append(parts + (all_panels * max(1.0, left / rows_per_read) if left else 0.0))
        parts += num_panels[order[place]] if place < len(order) else 0
    return sorted(order[: min(range(len(costs)), key=costs.__getitem__)])
