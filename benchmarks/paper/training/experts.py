"""A pool's adapters in a torch model, weighed per prompt with gradients, to train baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.training.lora_training import AnswerLoss, Batch, FrozenLinear
from lora_store import AdapterWeights

Sum = Literal["mixture", "fusion"]


class Gates:
    """The weights that every layer reads: (B, P), the weight of each of P adapters for each prompt of the batch."""

    def __init__(self, how: Sum) -> None:
        self.how, self.weights = how, torch.empty(0)


class ExpertLinear(nn.Module):
    """A frozen linear layer and P adapters of one rank, scalings folded into B.

    mixture: y = W x + Σ_p g_p B_p A_p x; fusion: y = W x + (Σ_p g_p B_p)(Σ_p g_p A_p) x; the server's two compositions.
    Dims: B prompts, T tokens, I in, O out, R rank. `lora_a` (P, R, I), `lora_b` (P, O, R).
    Source: LoraRetriever (ACL Findings 2024), section 4.2.
    """

    def __init__(self, base: FrozenLinear, lora_a: Tensor, lora_b: Tensor, gates: Gates) -> None:
        super().__init__()
        self._base, self._gates = base, gates
        self._lora_a, self._lora_b = lora_a, lora_b

    def forward(self, x: Tensor) -> Tensor:  # (B, T, I) -> (B, T, O)
        g, a, b = self._gates.weights, self._lora_a, self._lora_b
        y: Tensor = self._base(x)
        if self._gates.how == "mixture":
            h = torch.einsum("bti,pri->btpr", x, a) * g[:, None, :, None]
            return y + torch.einsum("btpr,por->bto", h, b)
        merged_a, merged_b = torch.einsum("bp,pri->bri", g, a), torch.einsum("bp,por->bor", g, b)
        return y + (x @ merged_a.mT) @ merged_b.mT


class ExpertModel:
    """`model` with every adapter of `experts`. Its linear layers must be FrozenLinear; it is changed in place."""

    def __init__(self, model: nn.Module, experts: Sequence[AdapterWeights], how: Sum) -> None:
        self.gates, self._decoder = Gates(how), model.get_submodule("model")
        for name in experts[0].modules:
            parent, _, child = name.rpartition(".")
            parts = [expert.modules[name] for expert in experts]
            lora_a = torch.stack([part.lora_a.float() for part in parts])
            lora_b = torch.stack([part.lora_b.float() * part.scaling for part in parts])
            owner, base = model.get_submodule(parent), model.get_submodule(name)
            frozen = base if isinstance(base, FrozenLinear) else base.get_submodule("_base")
            assert isinstance(frozen, FrozenLinear), name
            setattr(owner, child, ExpertLinear(frozen, lora_a, lora_b, self.gates))

    def loss(self, batch: Batch, weights: Tensor, loss_of: AnswerLoss) -> Tensor:
        """Return the mean cross entropy of the answer tokens of a padded batch, adapters weighed by rows (B, P)."""
        self.gates.weights = weights
        return loss_of(batch.read_by(self._decoder), batch.labels)
