"""Compute the output head only where a row's mask allows ids."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gpu_worker.model.packed_linear import PANEL, KernelLinear, PackedLinear
from gpu_worker.step.step_context import StepContext

_ROWS_PER_READ = 20  # rows that the whole head computes in the time in which it reads its weights
_NO_PANELS = np.empty(0, np.int64)


class OutputHead(nn.Module):
    """A model's output head on the CPU. A row whose mask allows few ids gets -inf for the others.

    The compiled kernel computes only the panels that contain allowed ids, if that is cheaper: their logits are those of
    the whole head, bit for bit. An id that is the only one needs no logit on any head, and gets 0. A row that is not
    finite gets all its logits, so that it stays unsound.
    """

    def __init__(self, whole: nn.Linear | KernelLinear | PackedLinear, step: StepContext) -> None:
        super().__init__()
        self.whole, self._step = whole, step

    def forward(self, x: Tensor) -> Tensor:  # (..., K, I) -> (..., K, V)
        masks = {row: mask for row, mask in enumerate(self._step.masks()) if mask is not None}
        if not masks:
            y: Tensor = self.whole(x)
            return y
        rows = x.reshape(-1, x.shape[-1])
        is_finite = rows.isfinite().all(dim=-1).tolist()
        panels = {row: panels_of(mask) for row, mask in masks.items() if is_finite[row]}
        if isinstance(self.whole, KernelLinear):
            y = self._in_parts(self.whole, rows, panels)
        elif len(panels) == len(rows) and all(found is _NO_PANELS for found in panels.values()):
            y = rows.new_full((len(rows), self.whole.out_features), -torch.inf)
        else:
            y = self.whole(rows)
        for row, found in panels.items():
            if found is _NO_PANELS:
                y[row, only_id(masks[row])] = 0.0
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def _in_parts(whole: KernelLinear, rows: Tensor, panels: Mapping[int, NDArray[np.int64]]) -> Tensor:
        counts = {row: len(found) for row, found in panels.items()}
        limited = rows_in_parts(counts, len(rows), -(-whole.out_features // PANEL))
        if not limited:
            y: Tensor = whole(rows)
            return y
        owners = np.repeat(limited, [counts[row] for row in limited])
        parts = np.stack([np.concatenate([panels[row] for row in limited]), owners], axis=1).astype(np.int32)
        others = np.setdiff1d(np.arange(len(rows)), limited).astype(np.int32)
        return whole.some(rows, others, parts[parts[:, 0].argsort(kind="stable")])


def panels_of(mask: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return the panels with allowed ids, one for each word that is not 0. `_NO_PANELS` if only one id is allowed."""
    panels = np.flatnonzero(mask)
    return _NO_PANELS if len(panels) == 1 and int(mask[panels[0]]).bit_count() == 1 else panels


def only_id(mask: NDArray[np.uint32]) -> int:
    """Return the id of a mask that allows one."""
    word = int(mask.argmax())
    return word * PANEL + int(mask[word]).bit_length() - 1


def rows_in_parts(num_panels: Mapping[int, int], num_rows: int, all_panels: int) -> list[int]:
    """Return the rows to compute panel by panel, so that the step's head costs least.

    A panel for one row costs 1. The whole head costs `all_panels`, and a twentieth of that for each further row.
    `num_panels`: those of the rows with a mask; `num_rows`: all rows.
    """
    order = sorted(num_panels, key=num_panels.__getitem__)
    costs, parts = [], 0.0
    for place in range(len(order) + 1):
        left = num_rows - place
        costs.append(parts + (all_panels * (1 + (left - 1) / _ROWS_PER_READ) if left else 0.0))
        parts += num_panels[order[place]] if place < len(order) else 0
    return sorted(order[: min(range(len(costs)), key=costs.__getitem__)])
