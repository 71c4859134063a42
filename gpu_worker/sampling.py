"""Choosing each row's next token, by its logits, its seed, its position and what it holds, never by its neighbours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpu_worker.argmax import argmax
from gpu_worker.penalties import adjust
from gpu_worker.request import SamplingParams

_GREEDY_BELOW = 1e-5  # temperatures at which the best id holds all of the mass
_SHORT_LIST = 1024  # ids kept before a full sort is needed for top_p


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row's next token is drawn with. `forbidden`: ids that may not come yet (ends, before min_tokens).

    `tokens` are the row's, read where a penalty asks for them; the answer begins at `num_prompt_tokens`.
    """

    params: SamplingParams
    seed: int
    position: int
    forbidden: tuple[int, ...] = ()
    tokens: Sequence[int] = ()
    num_prompt_tokens: int = 0


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """One token id a row, None where the row's logits are not finite. Dims: logits (B, V), left as they are."""
    if any(draw.params.adjusts_logits for draw in draws):
        logits = logits.to(torch.float32, copy=True)  # a penalty is smaller than bfloat16's steps
    elif any(draw.forbidden for draw in draws):
        logits = logits.clone()
    for row, draw in enumerate(draws):
        if draw.params.adjusts_logits:
            adjust(logits[row], draw.params, draw.tokens, draw.num_prompt_tokens)
        if draw.forbidden:
            logits[row, list(draw.forbidden)] = float("-inf")
    greedy, finite = argmax(logits)
    tokens: list[int | None] = []
    for row, draw in enumerate(draws):
        if not finite[row]:
            tokens.append(None)
        elif draw.params.temperature < _GREEDY_BELOW:
            tokens.append(greedy[row])
        else:
            tokens.append(_sample_row(logits[row].float(), draw))
    return tokens


def _sample_row(logits: Tensor, draw: Draw) -> int:
    """Inverse-CDF sampling: the first id whose cumulative probability passes the row's uniform number."""
    params = draw.params
    scaled = (logits - logits.max()) / params.temperature  # shifted first: a small temperature must not overflow
    if params.min_p > 0:  # p_i < min_p · p_max, where the largest of `scaled` is 0
        scaled = scaled.masked_fill(scaled < math.log(params.min_p), float("-inf"))
    if params.top_k == 0 and params.top_p == 1:
        ids, probs = None, scaled.softmax(dim=-1)
    else:
        ids, probs = _truncate(scaled, params.top_k, params.top_p)
    cumulative = probs.double().cumsum(dim=-1)
    threshold = uniform(draw.seed, draw.position) * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, threshold, right=True))
    index = min(index, len(cumulative) - 1)
    return index if ids is None else int(ids[index])


def _truncate(scaled: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """(ids, probabilities) of the top_k ids, then of the fewest of them that hold top_p of the mass, best first."""
    vocabulary = len(scaled)
    count = min(top_k, vocabulary) if top_k else vocabulary
    kept = min(count, _SHORT_LIST)
    total = scaled.logsumexp(dim=-1) if count == vocabulary else scaled.topk(count).values.logsumexp(dim=-1)
    values, ids = scaled.topk(kept)
    probs = (values - total).exp()
    if kept < count and float(probs.sum()) < top_p:
        values, ids = scaled.topk(count)
        probs = (values - total).exp()
    before = probs.cumsum(dim=-1) - probs
    keep = before < top_p
    keep[0] = True
    return ids[keep], probs[keep]


def uniform(seed: int, position: int) -> float:
    """The row's random number in [0, 1) at `position`: a counter-based generator keyed by the seed."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, position])).random())
