"""Bootstrap intervals of a share, over the queries of each task, over tasks, and over repeated runs."""

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


def bootstrap(
    values: np.ndarray, counts: np.ndarray | None = None, seed: int = 0, *, resamples_tasks: bool = False
) -> Interval:
    """Return the interval of the mean of `values` (runs, tasks, queries). Every task of a run has equal weight.

    Every run has equal weight too. Queries are resampled within their task, the same ones in every run, and runs as a
    whole. `resamples_tasks`: resample the tasks too, the same ones in every run. The interval is then for other tasks
    of this kind; without it, for these tasks. A task that is drawn twice gets different queries each time.
    `counts` (runs, tasks): the tasks of each run that count. A resample without any of them is left out.
    """
    counts = np.ones(values.shape[:2], bool) if counts is None else counts
    means = _resampled_means(values, counts, seed, resamples_tasks=resamples_tasks)
    mean = ((values.mean(axis=2) * counts).sum(axis=1) / counts.sum(axis=1)).mean()
    return _around(float(mean), means)


def _around(mean: float, means: np.ndarray) -> Interval:
    low, high = np.quantile(means, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Interval(mean, float(low), float(high))


def _resampled_means(values: np.ndarray, counts: np.ndarray, seed: int, *, resamples_tasks: bool) -> np.ndarray:
    """Return the mean of each resample. One without tasks that count is left out."""
    runs, tasks, queries = values.shape
    by_task = values.transpose(1, 0, 2) @ _resampled(tasks, queries, seed)  # (tasks, runs, resamples)
    counted = counts.T[:, :, np.newaxis].astype(float)  # (tasks, runs, 1 or resamples)
    if resamples_tasks:
        rng, shape = np.random.default_rng(seed + 1), (tasks, NUM_RESAMPLES)
        drawn, resample = rng.integers(0, tasks, shape), rng.integers(0, NUM_RESAMPLES, shape)
        by_task = by_task[drawn, :, resample].transpose(0, 2, 1)
        counted = counts.T[drawn].transpose(0, 2, 1).astype(float)
    num_counted = np.broadcast_to(counted.sum(axis=0), (runs, NUM_RESAMPLES))
    by_run = (by_task * counted).sum(axis=0) / np.maximum(num_counted, 1)
    chosen = np.random.default_rng(seed).integers(0, runs, (runs, NUM_RESAMPLES))
    has_tasks = np.take_along_axis(num_counted > 0, chosen, axis=0)
    sums = (np.take_along_axis(by_run, chosen, axis=0) * has_tasks).sum(axis=0)
    num_runs = has_tasks.sum(axis=0)
    means: np.ndarray = sums[num_runs > 0] / num_runs[num_runs > 0]
    return means


@lru_cache(maxsize=4)
def _resampled(tasks: int, queries: int, seed: int) -> np.ndarray:
    """Return (tasks, queries, resamples): the weight of each query in its task's mean."""
    drawn = np.random.default_rng(seed).multinomial(queries, [1 / queries] * queries, (tasks, NUM_RESAMPLES))
    return drawn.transpose(0, 2, 1) / queries
