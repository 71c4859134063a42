"""Random numbers keyed by (seed, position), so that a row draws the same ones in every batch, step and process.

The numbers equal those of `numpy.random.Philox`, computed for all rows at once; a generator object per row costs 20 µs.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), section 4.3: Philox4x64 with 10 rounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10
_MULTIPLIERS = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_KEY_STEPS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
_DROPPED = np.uint64(11)  # a double has 53 of the 64 bits
_Words = NDArray[np.uint64]


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """Return (N,) numbers in [0, 1): the first number of `Philox(key=seed, counter=[0, 0, 0, position])`.

    Seeds and positions are integers from 0 to 2**63 - 1.
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
