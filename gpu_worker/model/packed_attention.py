"""The attention function of packed steps, registered with transformers under its own name.

transformers builds no mask for unknown names, so causality, windows and lengths come from the step's plan.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import AttentionInterface

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.model.step_context import StepContext

ATTENTION_NAME = "loraretriever"
_IGNORED = frozenset({"position_ids", "is_causal"})  # the plan has the positions and is always causal


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    step: StepContext | None = None,
    scaling: float,
    sliding_window: int | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attend with the step's `AttentionPlan`. query (1, Q, N, D), key and value (1, H, N, D) -> (1, N, Q, D).

    Raises: BaseModelUnsupported if the model needs more than causal attention over the step's rows: its own mask,
    attention sinks, a soft-cap, any other argument, or a second call in the same layer.
    """
    if step is None:
        raise BaseModelUnsupported("the model does not pass keyword arguments to its attention layers")
    if attention_mask is not None:
        raise BaseModelUnsupported("the model passes its own attention mask, which packed rows cannot apply")
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise BaseModelUnsupported("the model uses attention that is not causal")
    if unknown := unknown_arguments(others):
        raise BaseModelUnsupported(
            f"the model's attention uses {', '.join(unknown)}, which this engine does not support"
        )
    layer = module.layer_idx
    assert isinstance(layer, int)
    attention = step.plan_attention(layer)
    attended = attention.attend(layer, query[0], key[0], value[0], scaling=scaling, sliding_window=sliding_window)
    return attended[None], None


def register() -> None:
    """Register the function with transformers. Models select it by `ATTENTION_NAME`."""
    AttentionInterface.register(ATTENTION_NAME, packed_attention)


def unknown_arguments(others: Mapping[str, object]) -> list[str]:
    """Return the names of the arguments that change an attention in a way that is not supported."""
    return sorted(name for name, value in others.items() if name not in _IGNORED and not _is_off(value))


def _is_off(value: object) -> bool:
    """Return whether an argument has no effect: None, False, or a rate of zero."""
    return value is None or (isinstance(value, bool | int | float) and not value)
