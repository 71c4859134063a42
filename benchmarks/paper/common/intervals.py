"""Bootstrap intervals of a share, over the queries of each task and over repeated runs."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 2000
COVERAGE = 0.95


class Interval(NamedTuple):
    """A mean, and the bounds that contain `COVERAGE` of the resampled means."""

    mean: float
    low: float
    high: float

    def in_percent(self) -> str:
        mean, low, high = (100 * value for value in self)
        return f"{mean:.1f} ({low:.1f} to {high:.1f})"

    def bounds_in_percent(self) -> str:
        return f"{100 * self.low:.1f} to {100 * self.high:.1f}"


def bootstrap(values: np.ndarray, counts: np.ndarray | None = None, seed: int = 0) -> Interval:
    """Return the interval of the mean of `values` (runs, tasks, queries). Every task of a run has equal weight.

    Every run has equal weight too. Queries are resampled within their task, the same ones in every run, and runs as a
    whole. Tasks are not resampled, because they are the pool. `counts` (runs, tasks): the tasks of each run that count.
    """
    runs, tasks, queries = values.shape
    counts = np.ones((runs, tasks), bool) if counts is None else counts
    by_task = values.transpose(1, 0, 2) @ _resampled(tasks, queries, seed)  # (tasks, runs, resamples)
    by_run = (by_task * counts.T[:, :, np.newaxis]).sum(axis=0) / counts.sum(axis=1)[:, np.newaxis]
    chosen = np.random.default_rng(seed).integers(0, runs, (runs, NUM_RESAMPLES))
    means = np.take_along_axis(by_run, chosen, axis=0).mean(axis=0)
    low, high = np.quantile(means, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    mean = ((values.mean(axis=2) * counts).sum(axis=1) / counts.sum(axis=1)).mean()
    return Interval(float(mean), float(low), float(high))


def bootstrap_tasks(values: np.ndarray, seed: int = 0) -> Interval:
    """Return the interval of the mean of `values` (tasks, queries) for other tasks of this kind: resample tasks too."""
    tasks, queries = values.shape
    by_task = (values[:, np.newaxis] @ _resampled(tasks, queries, seed))[:, 0]  # (tasks, resamples)
    rng, shape = np.random.default_rng(seed + 1), (tasks, NUM_RESAMPLES)
    means = by_task[rng.integers(0, tasks, shape), rng.integers(0, NUM_RESAMPLES, shape)].mean(axis=0)
    low, high = np.quantile(means, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Interval(float(values.mean()), float(low), float(high))


@lru_cache(maxsize=4)
def _resampled(tasks: int, queries: int, seed: int) -> np.ndarray:
    """Return (tasks, queries, resamples): the weight of each query in its task's mean."""
    drawn = np.random.default_rng(seed).multinomial(queries, [1 / queries] * queries, (tasks, NUM_RESAMPLES))
    return drawn.transpose(0, 2, 1) / queries
