"""What a forward pass reads beside its tensors."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from gpu_worker.bank.bank import ModuleBank
from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.step.attention_plan import AttentionPlan


class Composition(Protocol):
    """The LoRA arithmetic of one step: `DenseMapping` or `GroupedMapping`, which say the same."""

    def add(self, x: Tensor, y: Tensor, bank: ModuleBank) -> None:
        """y[n] += compose(x[n] @ bank.a.T) @ bank.bt, in place. Dims: x (..., N, I), y (..., N, O)."""


class StepContext:
    """The one mutable object a forward pass reads: each token's adapters and where its keys and values are kept.

    The engine fills it before each forward pass; `LoraLinear` and the attention function read it.
    """

    def __init__(self) -> None:
        self.composition: Composition | None = None  # None: no token of the step has an adapter
        self._attention: AttentionPlan | None = None
        self._attended: set[int] = set()

    def fill(self, composition: Composition | None, attention: AttentionPlan) -> None:
        """Set up the next forward pass."""
        self.composition, self._attention = composition, attention
        self._attended.clear()

    def attention_of(self, layer: int) -> AttentionPlan:
        """Return the step's attention, once for each layer.

        Raises: BaseModelUnsupported at a layer's second call, which would overwrite the keys and values of its first.
        """
        assert self._attention is not None, "the step context was not filled"
        if layer in self._attended:
            raise BaseModelUnsupported(f"the model attends more than once in layer {layer}")
        self._attended.add(layer)
        return self._attention
