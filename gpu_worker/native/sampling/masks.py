"""Apply the masks of grammars to logits with torch. The compiled sampler reads the masks itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gpu_worker.front.draw import Draw
from gpu_worker.model.transfer import to_device


def with_masks(logits: Tensor, draws: Sequence[Draw], *, is_copy: bool) -> Tensor:
    """Return the logits with -inf for every id that its row's mask excludes, in place if they are a copy already.

    NaN and +inf stay, so that an unsound row stays unsound. Without masks the logits are returned as they are.
    Dims: logits (B, V), one draw per row.
    """
    masks = [(row, draw.allowed) for row, draw in enumerate(draws) if draw.allowed is not None]
    if not masks:
        return logits
    masked = logits if is_copy else logits.clone()
    mask_bytes = np.stack([allowed for _, allowed in masks]).astype("<u4", copy=False).view(np.uint8)
    is_allowed = _expanded(to_device(torch.from_numpy(mask_bytes), logits.device), logits.shape[1])
    rows = to_device(torch.tensor([row for row, _ in masks]), logits.device)
    chosen = masked.index_select(0, rows)
    return masked.index_copy_(0, rows, torch.where(is_allowed | ~(chosen < torch.inf), chosen, -torch.inf))


def _expanded(mask_bytes: Tensor, vocabulary: int) -> Tensor:
    """Return the bits (R, V) of the bytes (R, W), the lowest first."""
    bits = mask_bytes[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=mask_bytes.device)
    return (bits & 1).flatten(1)[:, :vocabulary].bool()
