"""Attention of a packed step on the CPU, registered with transformers under a name of its own.

transformers builds no mask for a name it does not know: causality, windows and lengths are derived here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from gpu_worker.attention_plan import AttentionPlan, DecodeGroup, Segment
from gpu_worker.errors import BaseModelUnsupported
from gpu_worker.step_context import StepContext

ATTENTION_NAME = "loraretriever_cpu"


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
    """Store the step's keys and values, then attend every token to its own row up to itself.

    Dims: N tokens of the step, Q query heads, H key/value heads, D head size.
    query (1, Q, N, D), key and value (1, H, N, D) -> (1, N, Q, D).
    Raises: BaseModelUnsupported where the model hands over attention sinks or a soft-cap.
    """
    if others.get("s_aux") is not None or others.get("softcap") is not None:
        raise BaseModelUnsupported("attention sinks and soft-capping are not served by this engine")
    plan = step.attention
    layer = module.layer_idx
    assert isinstance(layer, int)
    plan.cache.write(layer, plan.token_rows, plan.token_positions, key[0], value[0])
    output = query.new_empty(query.shape[2], query.shape[1], query.shape[3])  # (N, Q, D)
    for segment in plan.prefill:
        output[segment.start : segment.end] = _prefill(plan, layer, segment, query, scaling, sliding_window)
    for group in plan.decode:
        output[group.tokens] = _decode(plan, layer, group, query, scaling, sliding_window)
    return output[None], None


def _prefill(
    plan: AttentionPlan, layer: int, segment: Segment, query: Tensor, scaling: float, sliding_window: int | None
) -> Tensor:
    """One chunk against everything its row holds. -> (n, Q, D)"""
    end = segment.total_len
    first = 0 if sliding_window is None else max(0, segment.context_len + 1 - sliding_window)
    keys = plan.cache.keys[layer][segment.row, :, first:end]
    values = plan.cache.values[layer][segment.row, :, first:end]
    whole = segment.context_len == 0 and (sliding_window is None or end <= sliding_window)
    mask = None if whole else _visible(segment, first, sliding_window)
    attended = scaled_dot_product_attention(
        query[:, :, segment.start : segment.end],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=whole,
        scale=scaling,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1)


def _visible(segment: Segment, first: int, sliding_window: int | None) -> Tensor:
    """(n, T) bool: position j is visible to position i when i - window < j <= i."""
    positions = torch.arange(segment.context_len, segment.total_len)[:, None]
    seen = torch.arange(first, segment.total_len)
    visible = seen <= positions
    if sliding_window is not None:
        visible &= seen > positions - sliding_window
    return visible


def _decode(
    plan: AttentionPlan, layer: int, group: DecodeGroup, query: Tensor, scaling: float, sliding_window: int | None
) -> Tensor:
    """One new token a row; grouped query heads share their keys without repeating them. -> (G, Q, D)"""
    keys = plan.cache.keys[layer][group.rows, :, : group.read_len]  # (G, H, T, D)
    values = plan.cache.values[layer][group.rows, :, : group.read_len]
    num_rows, num_heads, _, head_dim = keys.shape
    queries = query[0][:, group.tokens].transpose(0, 1).reshape(num_rows, num_heads, -1, head_dim)  # (G, H, Q/H, D)
    bias = group.bias(sliding_window, query.dtype)
    attended = scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scaling)
    return attended.reshape(num_rows, -1, head_dim)


def register() -> None:
    """Make the function known to transformers; models select it by `ATTENTION_NAME`."""
    AttentionInterface.register(ATTENTION_NAME, packed_attention)
