"""LoRAHub: one set of weights for all prompts, searched without gradients over adapters merged by their parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from benchmarks.training.lora_training import AnswerLoss, Batch, FrozenLinear
from lora_store import AdapterWeights


class FusedLinear(nn.Module):
    """A frozen linear layer and P adapters of one rank: y = W x + (Σ_p g_p B_p)(Σ_p g_p A_p) x, as the server's fusion.

    Dims: B prompts, T tokens, I in, O out, R rank. `lora_a` (P, R, I), `lora_b` (P, O, R), scalings folded into B.
    Source: LoraRetriever (ACL Findings 2024), section 4.2.
    """

    def __init__(self, base: FrozenLinear, lora_a: Tensor, lora_b: Tensor, shares: list[Tensor]) -> None:
        super().__init__()
        self._base, self._shares = base, shares
        self._lora_a, self._lora_b = lora_a, lora_b

    def forward(self, x: Tensor) -> Tensor:  # (B, T, I) -> (B, T, O)
        g = self._shares[0]
        y: Tensor = self._base(x)
        merged_a, merged_b = torch.einsum("p,pri->ri", g, self._lora_a), torch.einsum("p,por->or", g, self._lora_b)
        return y + (x @ merged_a.T) @ merged_b.T


class FusedModel:
    """`model` with every adapter of `experts`. Its linear layers must be FrozenLinear; it is changed in place."""

    def __init__(self, model: nn.Module, experts: Sequence[AdapterWeights]) -> None:
        self._shares, self._decoder = [torch.empty(0)], model.get_submodule("model")
        for name in experts[0].modules:
            parent, _, child = name.rpartition(".")
            parts = [expert.modules[name] for expert in experts]
            lora_a = torch.stack([part.lora_a.float() for part in parts])
            lora_b = torch.stack([part.lora_b.float() * part.scaling for part in parts])
            frozen = model.get_submodule(name)
            assert isinstance(frozen, FrozenLinear), name
            setattr(model.get_submodule(parent), child, FusedLinear(frozen, lora_a, lora_b, self._shares))

    def loss(self, batch: Batch, weights: Tensor, loss_of: AnswerLoss) -> Tensor:
        """Return the mean cross entropy of the answer tokens, adapters weighed by `weights` (P,)."""
        self._shares[0] = weights
        return loss_of(batch.read_by(self._decoder), batch.labels)


def search_weights(
    loss_of: Callable[[Tensor], float], num_adapters: int, num_steps: int, bound: float = 1.5
) -> tuple[Tensor, float]:
    """Return (weights, their loss), the best of at most `num_steps` attempts without gradients.

    The first attempt has all weights 0, which is the base model. |w| <= `bound`, and 0.05 times the mean |w| is added
    to the loss. Source: LoRAHub, which calls nevergrad's NGOpt with 40 steps. For 20 weights and 40 steps one after the
    other NGOpt is COBYLA, so this calls SciPy's, with a first step of a sixth of the weights' range as there.
    """
    attempts: list[tuple[float, Tensor]] = []

    def objective(found: np.ndarray) -> float:
        weights = torch.from_numpy(found).float().clamp(-bound, bound)
        if len(attempts) < num_steps:
            attempts.append((loss_of(weights) + 0.05 * float(weights.abs().mean()), weights))
        return attempts[-1][0]

    options = {"maxiter": num_steps, "rhobeg": bound / 3}
    bounds = [(-bound, bound)] * num_adapters
    minimize(objective, np.zeros(num_adapters), method="COBYLA", bounds=bounds, options=options)
    lowest, best = min(attempts, key=lambda attempt: attempt[0])
    return best, lowest
