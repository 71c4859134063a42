"""A linear layer that adds the adapters of each token's plan."""

from __future__ import annotations

from torch import Tensor, nn

from gpu_worker.bank.bank import ModuleBank
from gpu_worker.step.step_context import StepContext


class LoraLinear(nn.Module):
    """A base linear layer plus, for each token, the composed adapters of its plan.

    y[n] = base(x[n]) + compose(x[n] @ bank.a.T) @ bank.bt; bt includes the scaling. Without a plan y[n] = base(x[n]).
    Dims: N tokens, I in, O out, P active rank rows. bank.a (P, I) and bank.bt (P, O) are views of the active prefix.
    Source: LoraRetriever (ACL Findings 2024), section 4.3, contracted at rank level.
    """

    def __init__(self, base: nn.Module, bank: ModuleBank, step: StepContext) -> None:
        super().__init__()
        self.base, self._bank, self._step = base, bank, step

    def forward(self, x: Tensor) -> Tensor:  # (..., N, I) -> (..., N, O)
        y: Tensor = self.base(x)
        composition = self._step.composition
        if composition is not None and self._bank.is_used:
            composition.add(x, y, self._bank)
        return y
