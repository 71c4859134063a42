"""Attention of a packed step, registered with transformers under a name of its own.

transformers builds no mask for a name it does not know: causality, windows and lengths come from the step's plan.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AttentionInterface

from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.step_context import StepContext

ATTENTION_NAME = "loraretriever"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    step: StepContext,
    scaling: float,
    sliding_window: int | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """What `AttentionPlan.attend` of the step says. query (1, Q, N, D), key and value (1, H, N, D) -> (1, N, Q, D).

    Raises: BaseModelUnsupported where the model hands over attention sinks or a soft-cap.
    """
    if others.get("s_aux") is not None or others.get("softcap") is not None:
        raise BaseModelUnsupported("attention sinks and soft-capping are not served by this engine")
    layer = module.layer_idx
    assert isinstance(layer, int)
    attended = step.attention.attend(layer, query[0], key[0], value[0], scaling=scaling, sliding_window=sliding_window)
    return attended[None], None


def register() -> None:
    """Make the function known to transformers; models select it by `ATTENTION_NAME`."""
    AttentionInterface.register(ATTENTION_NAME, packed_attention)
