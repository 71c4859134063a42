"""Apply biases, penalties and forbidden ids to logits before tokens are chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.front.draw import Draw
from gpu_worker.model.transfer import to_device

_Entries = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Ids of one row, and a value for each."""


def adjust(logits: Tensor, draws: Sequence[Draw]) -> None:
    """Change the logits of all rows in place: first the bias, then the penalties in vLLM's order, then forbidden ids.

    With c_i the number of times id i was generated: l_i += bias_i; l_i = l_i / r if l_i > 0, else l_i · r, for every id
    in prompt or answer; l_i -= c_i · frequency + [c_i > 0] · presence; l_i = -inf if i is forbidden.
    Dims: logits (B, V) float32, one draw per row.
    """
    for places, values in _gathered(logits, draws, _bias):
        logits.index_put_(places, values, accumulate=True)
    for places, penalty in _gathered(logits, draws, _seen):
        held = logits[places]  # a repeated id is written repeatedly with the same value
        logits.index_put_(places, torch.where(held > 0, held / penalty, held * penalty))
    for places, values in _gathered(logits, draws, _generated):
        logits.index_put_(places, values, accumulate=True)
    for places, values in _gathered(logits, draws, _forbidden):
        held = logits[places]
        logits.index_put_(places, torch.where(held < torch.inf, values, held))  # an unsound row stays unsound


def _gathered(
    logits: Tensor, draws: Sequence[Draw], entries_of: Callable[[Draw], _Entries | None]
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Yield ((rows, ids), values) of all draws with entries, on the device. Yield nothing if there are none."""
    found = [(row, entries) for row, draw in enumerate(draws) if (entries := entries_of(draw)) is not None]
    if not found:
        return
    rows = np.concatenate([np.full(len(ids), row) for row, (ids, _) in found])
    ids, values = (np.concatenate([entries[part] for _, entries in found]) for part in (0, 1))
    table = to_device(torch.from_numpy(np.stack([rows, ids, values])), logits.device)  # float64 holds ids exactly
    yield (table[0].long(), table[1].long()), table[2].to(logits.dtype)


def _bias(draw: Draw) -> _Entries | None:
    if not draw.params.logit_bias:
        return None
    bias = dict(draw.params.logit_bias)
    return np.array(list(bias), dtype=np.int64), np.array(list(bias.values()), dtype=np.float64)


def _seen(draw: Draw) -> _Entries | None:
    if draw.params.repetition_penalty == 1:
        return None
    ids = np.array(draw.tokens, dtype=np.int64)
    return ids, np.full(len(ids), draw.params.repetition_penalty)


def _generated(draw: Draw) -> _Entries | None:
    params = draw.params
    if not params.frequency_penalty and not params.presence_penalty:
        return None
    ids, counts = np.unique(np.array(draw.tokens[draw.num_prompt_tokens :], dtype=np.int64), return_counts=True)
    return ids, -(counts.astype(np.float64) * params.frequency_penalty + params.presence_penalty)


def _forbidden(draw: Draw) -> _Entries | None:
    if not draw.forbidden:
        return None
    return np.array(draw.forbidden, dtype=np.int64), np.full(len(draw.forbidden), -np.inf)
