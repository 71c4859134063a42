"""The score floor: what a prompt must reach, measured on how the pool's own samples score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

NO_FLOOR = -1.0  # the least a cosine can be: nothing is below it
_FLOOR_SHARE = 0.01
_LEVELS = 10_000  # a score counts by its first four decimals
Levels = NDArray[np.int16]  # scores as whole numbers: score × 10,000
LevelCounts = NDArray[np.int64]  # (20,001,) how many scores are of each level, from -1 to 1


def calibrate_floor(groups: Sequence[np.ndarray]) -> float:
    """The score under which 1 % of the samples fall when each is scored against the others of its adapter.

    score(x_i) = cos(x_i, mean of x_j over j ≠ i), to four decimals. `groups`: per adapter (n, D) unit rows; an adapter
    of one sample has no others and does not count. NO_FLOOR where nothing counts.
    """
    return floor_of(count_levels(score_levels(leave_one_out_scores(group)) for group in groups))


def leave_one_out_scores(vectors: np.ndarray) -> NDArray[np.float32]:
    """Cosine of each row (n, D) to the mean of the other rows: (n,), or (0,) for fewer than two rows."""
    rows = np.asarray(vectors, np.float64)
    if len(rows) < 2:
        return np.empty(0, np.float32)
    others = rows.sum(axis=0) - rows  # the mean of the others but for its length, which a cosine drops
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(others, axis=1)
    scores = np.sum(rows * others, axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny)
    return np.asarray(scores, np.float32)


def score_levels(scores: NDArray[np.float32]) -> Levels:
    return np.rint(np.clip(scores, -1, 1) * _LEVELS).astype(np.int16)


def count_levels(groups: Iterable[Levels]) -> LevelCounts:
    """Counts of many adapters add up, so a pool's counts follow it without being counted anew."""
    together = np.concatenate([np.empty(0, np.int16), *groups])
    return np.bincount(together.astype(np.int64) + _LEVELS, minlength=2 * _LEVELS + 1)


def floor_of(counts: LevelCounts) -> float:
    """The first percentile of the counted scores, interpolated as numpy does; NO_FLOOR where there is none."""
    up_to = np.cumsum(counts)
    if up_to[-1] == 0:
        return NO_FLOOR
    place = _FLOOR_SHARE * float(up_to[-1] - 1)
    below, above = np.searchsorted(up_to, [int(place) + 1, int(np.ceil(place)) + 1]) - _LEVELS
    return float(below + (place - int(place)) * (above - below)) / _LEVELS
