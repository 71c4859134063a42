"""The specification of sampling: loops over every id of one row, in double precision."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from gpu_worker.front.draw import GREEDY_BELOW, Draw
from gpu_worker.front.request.request import SamplingParams

ROUNDING = 1e-6
"""Relative to the mass that is drawn from. The fast passes add float32 masses in another order, so a uniform number
this close to a bound between two ids may fall on either side, and so may a cut by min_p or top_p."""


def uniform_slowly(seed: int, position: int) -> float:
    return float(np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, position])).random())


def adjusted_slowly(logits: Tensor, draw: Draw) -> list[float]:
    """Return the row's logits after bias, penalties and forbidden ids. Each step is rounded to float32."""
    params, one = draw.params, np.float32
    prompt, made = draw.tokens[: draw.num_prompt_tokens], draw.tokens[draw.num_prompt_tokens :]
    bias, seen, counts = dict(params.logit_bias), {*prompt, *made}, Counter(made)
    penalty = one(params.repetition_penalty)
    values = []
    for i, number in enumerate(logits.tolist()):
        value = one(number)
        if i in bias:
            value += one(bias[i])
        if i in seen and params.repetition_penalty != 1:
            value = value / penalty if value > 0 else value * penalty
        if counts[i]:
            value -= one(counts[i] * params.frequency_penalty + params.presence_penalty)
        values.append(-math.inf if i in draw.forbidden or not is_allowed(draw, i) else float(value))
    return values


def is_allowed(draw: Draw, token_id: int) -> bool:
    """Whether the mask has the id's bit, or there is no mask."""
    return draw.allowed is None or bool(int(draw.allowed[token_id // 32]) >> token_id % 32 & 1)


def tokens_slowly(logits: Tensor, draw: Draw) -> set[int | None]:
    """Return the ids that the row may choose: one, or both neighbours of a bound within rounding."""
    original = logits.tolist()
    if any(math.isnan(value) or value == math.inf for value in original) or max(original) == -math.inf:
        return {None}
    values = adjusted_slowly(logits, draw)
    if max(values) == -math.inf:
        return {None}
    ranked = sorted(range(len(values)), key=values.__getitem__, reverse=True)  # equal ones by their ids
    if draw.params.temperature < GREEDY_BELOW:
        return {ranked[0]}
    best = values[ranked[0]]
    masses = [math.exp((value - best) / draw.params.temperature) for value in values]
    number = uniform_slowly(draw.seed, draw.position)
    found: set[int | None] = set()
    for slack in (-ROUNDING, 0.0, ROUNDING):
        kept = kept_slowly(ranked, masses, draw.params, slack)
        found.update(_at(number, kept, masses))
    return found


def kept_slowly(ranked: list[int], masses: list[float], params: SamplingParams, slack: float = 0.0) -> list[int]:
    """Return the ids that may be drawn, in the order in which they are tried."""
    first, kept = ranked[0], ranked[: params.top_k or None]
    kept = [i for i in kept if i == first or masses[i] >= params.min_p * (1 + slack)]
    if params.top_p < 1:
        total, held, count = math.fsum(masses[i] for i in kept), 0.0, 0
        while count == 0 or (count < len(kept) and held < params.top_p * (1 + slack) * total):
            held += masses[kept[count]]
            count += 1
        kept = kept[:count]
    return sorted(kept) if params.top_k == 0 and params.top_p == 1 else kept


def _at(number: float, kept: list[int], masses: list[float]) -> Iterator[int]:
    """Return every id whose share of the mass, up to rounding, contains the number."""
    total, held = math.fsum(masses[i] for i in kept), 0.0
    for i in kept:
        begin, held = held, held + masses[i]
        if masses[i] > 0 and begin - ROUNDING * total <= number * total < held + ROUNDING * total:
            yield i


def scored_slowly(logits: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Return the token's log probability, and (id, log probability) of the most likely ids; -9999 for -inf."""
    values = logits.double().tolist()
    best = max(values)
    mass = math.log(math.fsum(math.exp(value - best) for value in values))  # it would be lost if added to a huge `best`
    ranked = sorted(range(len(values)), key=values.__getitem__, reverse=True)[:count]
    scores = [max(value - best - mass, -9999.0) for value in values]
    return scores[token], [(i, scores[i]) for i in ranked]
