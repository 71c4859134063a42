"""What a request changes in its logits before a token is chosen: a bias by id, and penalties for what came before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gpu_worker.request import SamplingParams


def adjust(logits: Tensor, params: SamplingParams, tokens: Sequence[int], num_prompt_tokens: int) -> None:
    """Change one row's logits in place: the bias first, then the penalties, in vLLM's order.

    With c_i how often id i was generated: l_i += bias_i; l_i = l_i / r where l_i > 0, else l_i · r, for every id in
    prompt or answer; l_i -= c_i · frequency + [c_i > 0] · presence.
    Dims: logits (V,) float32; tokens hold the prompt and the answer so far.
    """
    if params.logit_bias:
        ids, values = zip(*params.logit_bias, strict=True)
        logits[list(ids)] += torch.tensor(values, device=logits.device)
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(tokens)), device=logits.device)
        held = logits[seen]
        logits[seen] = torch.where(held > 0, held / params.repetition_penalty, held * params.repetition_penalty)
    if params.frequency_penalty or params.presence_penalty:
        ids_made, counts = np.unique(tokens[num_prompt_tokens:], return_counts=True)
        lowered = counts * params.frequency_penalty + params.presence_penalty
        logits[ids_made.tolist()] -= torch.tensor(lowered, dtype=logits.dtype, device=logits.device)
