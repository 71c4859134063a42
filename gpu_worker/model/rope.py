"""Fix the frequencies of rotary embeddings that depend on the length of the sequence."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gpu_worker.errors import BaseModelUnsupported

_LONGROPE = "longrope"


def pin_longrope(model: nn.Module, max_len: int) -> None:
    """Give every `longrope` embedding one set of factors: short if `max_len` is within the original length, else long.

    transformers chooses the short or the long factors by the largest position in a forward pass. Here a pass has rows
    of many requests, so one long row would change all other answers, and a row that grows beyond the original length
    would read keys rotated with the other factors.
    `max_len`: tokens of the longest row. Raises: BaseModelUnsupported for unknown layouts.
    Source: LongRoPE (ICML 2024), section 3.3; one set for all lengths, like vLLM.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if kind == _LONGROPE:
            _pin(module, max_len)
        elif isinstance(kind, dict) and _LONGROPE in kind.values():
            raise BaseModelUnsupported("longrope embeddings that differ between kinds of layers are not supported")


def _pin(module: Any, max_len: int) -> None:
    """Store the chosen factors in both places."""
    parameters = module.config.rope_parameters
    original_len = parameters["original_max_position_embeddings"]
    is_long = max_len > original_len
    seq_len = original_len + 1 if is_long else original_len
    inv_freq, _ = ROPE_INIT_FUNCTIONS[_LONGROPE](module.config, module.inv_freq.device, seq_len=seq_len)
    module.inv_freq.copy_(inv_freq)
    module.original_inv_freq = module.long_inv_freq = inv_freq
    if "short_mscale" in parameters:  # Phi-3.5-MoE also scales cosine and sine by length
        scale = parameters["long_mscale" if is_long else "short_mscale"]
        parameters["short_mscale"] = parameters["long_mscale"] = scale
