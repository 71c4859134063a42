"""Attention of a packed step, registered with transformers under a name of its own.

transformers builds no mask for a name it does not know: causality, windows and lengths come from the step's plan.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AttentionInterface

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.step.step_context import StepContext

ATTENTION_NAME = "loraretriever"
_IGNORED = frozenset({"position_ids", "is_causal"})  # the plan knows the positions, and is always causal


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

    Raises: BaseModelUnsupported where the model asks for more than causal attention over the step's rows: a mask of
    its own, attention sinks, a soft-cap, any other argument, or a second attention in the same layer.
    """
    if step is None:
        raise BaseModelUnsupported("the model does not pass keyword arguments on to its attention layers")
    if attention_mask is not None:
        raise BaseModelUnsupported("the model brings an attention mask of its own, which packed rows cannot apply")
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise BaseModelUnsupported("the model asks for attention that is not causal")
    if unknown := sorted(name for name, value in others.items() if name not in _IGNORED and not _is_off(value)):
        raise BaseModelUnsupported(f"the model's attention needs {', '.join(unknown)}, which this engine does not have")
    layer = module.layer_idx
    assert isinstance(layer, int)
    attention = step.attention_of(layer)
    attended = attention.attend(layer, query[0], key[0], value[0], scaling=scaling, sliding_window=sliding_window)
    return attended[None], None


def register() -> None:
    """Make the function known to transformers; models select it by `ATTENTION_NAME`."""
    AttentionInterface.register(ATTENTION_NAME, packed_attention)


def _is_off(value: object) -> bool:
    """Return whether an argument asks for nothing: None, False, or a rate of zero."""
    return value is None or (isinstance(value, bool | int | float) and not value)
