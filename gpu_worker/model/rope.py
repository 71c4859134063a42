"""Rotary embeddings whose frequencies depend on the length of the sequence, made constant."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gpu_worker.errors import BaseModelUnsupported

_LONGROPE = "longrope"


def pin_longrope(model: nn.Module, max_len: int) -> None:
    """Give every `longrope` embedding of `model` one set of factors: short where no row outgrows the original length.

    transformers chooses the short or the long factors by the largest position of a forward pass. A pass here holds
    rows of many requests, so one long row would change the answers of all others, and a row that grows beyond the
    original length would read keys that were rotated by the other set.
    `max_len`: tokens of the longest row. Raises: BaseModelUnsupported for layouts that this function does not know.
    Source: LongRoPE (ICML 2024), section 3.3; one set for all lengths, as vLLM does it.
    """
    for module in model.modules():
        if getattr(module, "rope_type", None) == _LONGROPE:
            _pin(module, max_len)
        elif _is_longrope_by_layer(module):
            raise BaseModelUnsupported("longrope embeddings that differ between kinds of layers are not served")


def _pin(module: Any, max_len: int) -> None:
    """Store the chosen set in the places of both."""
    parameters = module.config.rope_parameters
    original_len = parameters["original_max_position_embeddings"]
    is_long = max_len > original_len
    seq_len = original_len + 1 if is_long else original_len
    inv_freq, _ = ROPE_INIT_FUNCTIONS[_LONGROPE](module.config, module.inv_freq.device, seq_len=seq_len)
    module.inv_freq.copy_(inv_freq)
    module.original_inv_freq = module.long_inv_freq = inv_freq
    if "short_mscale" in parameters:  # Phi-3.5-MoE scales cosine and sine by length too
        scale = parameters["long_mscale" if is_long else "short_mscale"]
        parameters["short_mscale"] = parameters["long_mscale"] = scale


def _is_longrope_by_layer(module: nn.Module) -> bool:
    types = getattr(module, "rope_type", None)
    return isinstance(types, dict) and _LONGROPE in types.values()
