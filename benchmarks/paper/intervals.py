"""Bootstrap intervals of a share, over the queries of each task and over repeated runs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 2000
COVERAGE = 0.95


class Interval(NamedTuple):
    """A mean, and the bounds that `COVERAGE` of the resampled means lie between."""

    mean: float
    low: float
    high: float

    def in_percent(self) -> str:
        mean, low, high = (100 * value for value in self)
        return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def bootstrap(values: np.ndarray, counts: np.ndarray | None = None, seed: int = 0) -> Interval:
    """The mean of `values` (runs, tasks, queries), every task of a run weighing the same, then every run.

    Queries are resampled within their task, the same ones in every run, and runs as a whole: tasks stay, they are the
    pool. `counts` (runs, tasks): which tasks of a run count.
    """
    runs, tasks, queries = values.shape
    counts = np.ones((runs, tasks), bool) if counts is None else counts
    rng = np.random.default_rng(seed)
    means = np.empty(NUM_RESAMPLES)
    for number in range(NUM_RESAMPLES):
        chosen = rng.integers(0, queries, (tasks, queries))
        by_task = np.take_along_axis(values, chosen[np.newaxis], axis=2).mean(axis=2)
        means[number] = _mean(by_task, counts)[rng.integers(0, runs, runs)].mean()
    low, high = np.quantile(means, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Interval(float(_mean(values.mean(axis=2), counts).mean()), float(low), float(high))


def _mean(by_task: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(runs,) of (runs, tasks)."""
    return (by_task * counts).sum(axis=1) / counts.sum(axis=1)
