"""The inputs for choosing a row's next token, and a table of them for a whole step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpu_worker.front.philox import uniforms
from gpu_worker.front.request.request import SamplingParams

GREEDY_BELOW = 1e-5  # temperature at which the best id has all of the mass

TABLE = np.dtype(
    [
        ("row", np.int64),
        ("top_k", np.int64),  # 0: all ids
        ("allowed", np.uint64),  # address of the row's mask; 0: all ids
        ("uniform", np.float64),
        ("top_p", np.float64),
        ("inverse_temperature", np.float32),
        ("log_min_p", np.float32),
    ]
)
"""One entry per row of logits. `sampling.cpp` reads it as its struct `Draw`; greedy rows have top_k 1."""


@dataclass(frozen=True, slots=True)
class Draw:
    """The inputs for choosing one row's next token.

    `forbidden`: ids that must not be chosen yet (end tokens before min_tokens). `tokens`: all tokens of the row, which
    penalties read; the answer begins at `num_prompt_tokens`. `allowed`: a bit per id, the lowest first; the others
    cannot be chosen.
    """

    params: SamplingParams
    seed: int
    position: int
    forbidden: tuple[int, ...] = ()
    tokens: Sequence[int] = ()
    num_prompt_tokens: int = 0
    allowed: NDArray[np.uint32] | None = None

    @property
    def changes_logits(self) -> bool:
        """Return whether penalties, a bias or forbidden ids change the row's logits."""
        return bool(self.forbidden) or self.params.adjusts_logits

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature < GREEDY_BELOW


def make_table(draws: Sequence[Draw], vocabulary: int) -> NDArray[np.void]:
    """Return the draws as a table of `TABLE`, numbered in order. Greedy rows need no random number."""
    table = np.zeros(len(draws), TABLE)
    table["row"] = range(len(draws))
    table["top_k"], table["top_p"], table["inverse_temperature"], table["log_min_p"] = 1, 1, 1, -np.inf
    for row, draw in enumerate(draws):
        if draw.allowed is not None:
            table["allowed"][row] = draw.allowed.ctypes.data
    sampled = [row for row, draw in enumerate(draws) if not draw.is_greedy]
    if not sampled:
        return table
    params = [draws[row].params for row in sampled]
    table["uniform"][sampled] = uniforms([draws[row].seed for row in sampled], [draws[row].position for row in sampled])
    table["top_k"][sampled] = [min(own.top_k, vocabulary) for own in params]
    table["top_p"][sampled] = [own.top_p for own in params]
    table["inverse_temperature"][sampled] = [1 / own.temperature for own in params]
    table["log_min_p"][sampled] = [math.log(own.min_p) if own.min_p > 0 else -math.inf for own in params]
    return table
