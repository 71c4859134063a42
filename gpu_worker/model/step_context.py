"""The state of a forward pass that is not passed as a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from gpu_worker.bank.bank import ModuleBank
from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.front.grammar.state import Mask
from gpu_worker.model.attention_plan import AttentionPlan

Masks = Callable[[], Sequence[Mask | None]]
"""Returns a mask for each of the first rows of logits. None: every logit is read."""


Outputs = Sequence[tuple[Tensor, ModuleBank]]
"""The outputs of base layers that read the same input, and the banks of these layers."""


class Composition(Protocol):
    """The LoRA products of one step: `DenseMapping` or `GroupedMapping`, with equal results."""

    def add(self, x: Tensor, outputs: Outputs) -> None:
        """Add y[n] += compose(x[n] @ bank.a.T) @ bank.bt to each output, in place. Dims: x (..., N, I), y (..., N, O).

        There is at least one output, and all have one InputBank.
        """


class ExpertComposition(Protocol):
    """The LoRA products of one step on fused experts: `ExpertMapping`."""

    def __contains__(self, name: object) -> bool: ...
    def add(self, name: str, expert: int, tokens: Tensor, x: Tensor, y: Tensor) -> None: ...


class StepContext:
    """The only mutable object that a forward pass reads: the step's composition, its attention plan and its masks.

    The engine fills it before each forward pass; `LoraLinear`, the attention function and `OutputHead` read it.
    """

    def __init__(self) -> None:
        self.composition: Composition | None = None  # None if no token of the step has an adapter
        self.experts: ExpertComposition | None = None  # None if no token of the step has an adapter on experts
        self.masks: Masks = tuple  # none
        self._attention: AttentionPlan | None = None
        self._attended: set[int] = set()

    def fill(
        self,
        composition: Composition | None,
        attention: AttentionPlan,
        masks: Masks = tuple,
        *,
        experts: ExpertComposition | None = None,
    ) -> None:
        """Prepare the next forward pass. `masks` is called when the logits are computed."""
        self.composition, self._attention, self.masks = composition, attention, masks
        self.experts = experts
        self._attended.clear()

    @property
    def attention(self) -> AttentionPlan | None:
        """Return the step's attention plan. Unlike `attention_of`, this is not the call of a layer."""
        return self._attention

    def plan_attention(self, layer: int) -> AttentionPlan:
        """Return the step's attention plan, once per layer.

        Raises: BaseModelUnsupported at a layer's second call, which would overwrite the first call's keys and values.
        """
        assert self._attention is not None, "the step context was not filled"
        if layer in self._attended:
            raise BaseModelUnsupported(f"the model attends more than once in layer {layer}")
        self._attended.add(layer)
        return self._attention
