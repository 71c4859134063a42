"""The state of a forward pass that is not passed as a tensor."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from gpu_worker.bank.bank import ModuleBank
from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.step.attention_plan import AttentionPlan


class Composition(Protocol):
    """The LoRA products of one step: `DenseMapping` or `GroupedMapping`, with equal results."""

    def add(self, x: Tensor, y: Tensor, bank: ModuleBank) -> None:
        """Add y[n] += compose(x[n] @ bank.a.T) @ bank.bt, in place. Dims: x (..., N, I), y (..., N, O)."""


class StepContext:
    """The only mutable object that a forward pass reads: the step's composition and its attention plan.

    The engine fills it before each forward pass; `LoraLinear` and the attention function read it.
    """

    def __init__(self) -> None:
        self.composition: Composition | None = None  # None if no token of the step has an adapter
        self._attention: AttentionPlan | None = None
        self._attended: set[int] = set()

    def fill(self, composition: Composition | None, attention: AttentionPlan) -> None:
        """Prepare the next forward pass."""
        self.composition, self._attention = composition, attention
        self._attended.clear()

    def attention_of(self, layer: int) -> AttentionPlan:
        """Return the step's attention plan, once per layer.

        Raises: BaseModelUnsupported at a layer's second call, which would overwrite the first call's keys and values.
        """
        assert self._attention is not None, "the step context was not filled"
        if layer in self._attended:
            raise BaseModelUnsupported(f"the model attends more than once in layer {layer}")
        self._attended.add(layer)
        return self._attention
