"""Compose adapters into one that computes what a mixture of them does: the weighted sum of their outputs.

Dims: R rank, I in, O out. Of fused experts each matrix has a first dimension for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lora_store.adapter import ModuleWeights

if TYPE_CHECKING:
    from torch import Tensor

Modules = Mapping[str, ModuleWeights]


def compose(parts: Sequence[tuple[Modules, float]], rank: int | None = None) -> tuple[dict[str, ModuleWeights], float]:
    """Return the adapter that adds `weight · scaling · B A` of all parts, in float32, and its relative error.

    Without `rank` the parts' ranks are concatenated, which is exact. With `rank`, each module is the nearest one of at
    most that rank. The error is the Frobenius norm of what is left out over that of the sum, of all modules together.
    Raises: ValueError if a layer has other shapes in one part than in another.
    """
    composed: dict[str, ModuleWeights] = {}
    whole = left_out = 0.0
    for name in sorted({name for modules, _ in parts for name in modules}):
        a, b = _concatenated([(modules[name], weight) for modules, weight in parts if name in modules])
        if rank is not None:
            a, b, energy, lost = _truncated(a, b, rank)
            whole, left_out = whole + energy, left_out + lost
        composed[name] = ModuleWeights(a, b, 1.0)
    return composed, math.sqrt(left_out / whole) if whole else 0.0


def _concatenated(pairs: Sequence[tuple[ModuleWeights, float]]) -> tuple[Tensor, Tensor]:
    """Return A (R, I) and B (O, R) of the sum, R being the sum of the ranks."""
    import torch  # imported here, since it takes seconds

    if len({(*module.lora_a.shape[:-2], module.lora_a.shape[-1], module.lora_b.shape[-2]) for module, _ in pairs}) > 1:
        raise ValueError("the adapters' base models differ: their layers have other shapes")
    a = torch.cat([module.lora_a.float() for module, _ in pairs], -2)
    b = torch.cat([weight * module.scaling * module.lora_b.float() for module, weight in pairs], -1)
    return a, b


def _truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """Return A and B of the nearest product of at most this rank, the squared norm of B A, and of what is left out.

    The product is never made: with B = Q S and Aᵀ = P T the singular values of B A are those of S Tᵀ, which is (R, R).
    """
    import torch  # imported here, since it takes seconds

    q, s = torch.linalg.qr(b.double())
    p, t = torch.linalg.qr(a.double().mT)
    left, values, right = torch.linalg.svd(s @ t.mT)
    root = values[..., :rank].sqrt()
    new_a = root[..., :, None] * (right[..., :rank, :] @ p.mT)
    new_b = (q @ left[..., :rank]) * root[..., None, :]
    squares = values.square()
    return new_a.float(), new_b.float(), float(squares.sum()), float(squares[..., rank:].sum())
