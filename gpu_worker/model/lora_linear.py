"""A linear layer that adds the adapters of each token's plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from gpu_worker.bank.bank import ModuleBank
from gpu_worker.model.step_context import StepContext


class LoraLinear(nn.Module):
    """A base linear layer plus, for each token, the composed adapters of its plan.

    y[n] = base(x[n]) + compose(x[n] @ bank.a.T) @ bank.bt; bt includes the scaling. Without a plan y[n] = base(x[n]).
    Dims: N tokens, I in, O out, P active rank rows. bank.a (P, I) and bank.bt (P, O) are views of the active prefix.
    Source: LoraRetriever (ACL Findings 2024), section 4.3, contracted at rank level.
    """

    def __init__(self, base: nn.Module, bank: ModuleBank, step: StepContext) -> None:
        super().__init__()
        self.base, self.bank, self._step = base, bank, step

    def forward(self, x: Tensor) -> Tensor:  # (..., N, I) -> (..., N, O)
        return self.each([self], x)[0]

    @staticmethod
    def each(layers: Sequence[LoraLinear], x: Tensor) -> list[Tensor]:
        """Return the layers' outputs. They share an InputBank, and their adapters are added in one call."""
        outputs: list[Tensor] = [layer.base(x) for layer in layers]
        composition = layers[0]._step.composition
        if composition is not None:
            used = [(y, layer.bank) for y, layer in zip(outputs, layers, strict=True) if layer.bank.is_used]
            if used:
                composition.add(x, used)
        return outputs


def compute_outputs(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Return the output of each layer. If all share an InputBank, add their adapters in one call.

    The layers' own `forward` is not called then, except where a layer has hooks.
    """
    has_hooks = any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    if not has_hooks and all(isinstance(layer, LoraLinear) for layer in layers):
        found = cast("Sequence[LoraLinear]", layers)
        if all(layer.bank.inputs is found[0].bank.inputs for layer in found):
            return LoraLinear.each(found, x)
    return [layer(x) for layer in layers]
