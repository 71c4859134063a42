"""The inputs for choosing a row's next token, and a table of them for a whole step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gpu_worker.front.request.request import SamplingParams

GREEDY_BELOW = 1e-5  # temperature at which the best id has all of the mass
_ROUNDS = 10  # of Philox
_MULTIPLIERS = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_KEY_STEPS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
_DROPPED = np.uint64(11)  # a double has 53 of the 64 bits
_Words = NDArray[np.uint64]

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
    table = _greedy_table(len(draws)).copy()
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


@lru_cache(maxsize=64)
def _greedy_table(num_rows: int) -> NDArray[np.void]:
    table = np.zeros(num_rows, TABLE)
    table["row"] = range(num_rows)
    table["top_k"], table["top_p"], table["inverse_temperature"], table["log_min_p"] = 1, 1, 1, -np.inf
    return table


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """Return (N,) random numbers in [0, 1), keyed so that a row draws the same ones in every batch, step and process.

    They equal the first number of numpy's `Philox(key=seed, counter=[0, 0, 0, position])`, computed for all rows at
    once; a generator object per row costs 20 µs. Seeds and positions are integers from 0 to 2**63 - 1.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), section 4.3: Philox4x64, 10 rounds.
    """
    count = len(seeds)
    counter = [
        np.ones(count, np.uint64),
        np.zeros(count, np.uint64),
    ]  # numpy increments the counter before the first block
    counter += [np.zeros(count, np.uint64), np.array(positions, dtype=np.uint64)]
    key = [np.array(seeds, dtype=np.uint64), np.zeros(count, np.uint64)]
    for _ in range(_ROUNDS):
        high0, low0 = _product(counter[0], _MULTIPLIERS[0])
        high1, low1 = _product(counter[2], _MULTIPLIERS[1])
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [word + step for word, step in zip(key, _KEY_STEPS, strict=True)]
    return (counter[0] >> _DROPPED).astype(np.float64) * 2.0**-53


def _product(words: _Words, factor: np.uint64) -> tuple[_Words, _Words]:
    """Return the (high, low) 64 bits of each 128-bit product, computed from 32-bit halves."""
    high, low = words >> _HALF, words & _LOW
    factor_high, factor_low = factor >> _HALF, factor & _LOW
    low_low, high_low = low * factor_low, high * factor_low
    middle = high_low + (low_low >> _HALF)  # fits: (2^32 - 1)^2 + 2^32 - 1 < 2^64
    carried = (middle & _LOW) + low * factor_high
    return high * factor_high + (middle >> _HALF) + (carried >> _HALF), words * factor
