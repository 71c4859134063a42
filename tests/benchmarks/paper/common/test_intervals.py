from __future__ import annotations

import numpy as np
import pytest

from benchmarks.paper.common.intervals import bootstrap


def slow_interval(values: np.ndarray, counts: np.ndarray, *, resamples_tasks: bool) -> tuple[float, float]:
    """Return the bounds of 2,000 resamples, each made query by query."""
    rng, means = np.random.default_rng(99), []
    runs, tasks, queries = values.shape
    while len(means) < 2000:
        drawn = [int(rng.integers(tasks)) if resamples_tasks else task for task in range(tasks)]
        asked = [rng.integers(0, queries, queries) for _ in drawn]
        by_run = []
        for run in rng.integers(0, runs, runs):
            found = [values[run, task, q].mean() for task, q in zip(drawn, asked, strict=True) if counts[run, task]]
            by_run += [sum(found) / len(found)] if found else []
        means += [sum(by_run) / len(by_run)] if by_run else []
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


@pytest.mark.parametrize("resamples_tasks", [False, True])
@pytest.mark.parametrize("runs", [1, 3])
def test_the_interval_is_that_of_a_loop_over_queries(runs: int, resamples_tasks: bool) -> None:
    rng = np.random.default_rng(4)
    shares = rng.random((1, 7, 1)) + rng.normal(0, 0.1, (runs, 1, 1))
    values = (rng.random((runs, 7, 6)) < shares).astype(float)
    counts = rng.random((runs, 7)) < 0.7
    counts[:, 0] = True
    found = bootstrap(values, counts, resamples_tasks=resamples_tasks)
    low, high = slow_interval(values, counts, resamples_tasks=resamples_tasks)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.08 * (high - low))


def test_only_selected_tasks_count_and_runs_have_equal_weight() -> None:
    values = np.zeros((2, 3, 4))
    values[0, 0] = 1.0
    counts = np.array([[True, False, False], [True, True, True]])
    assert bootstrap(values, counts).mean == 0.5


def test_a_resample_without_a_task_that_counts_is_left_out() -> None:
    values = np.zeros((1, 3, 4))
    values[0, 0] = 1.0
    assert bootstrap(values, np.array([[True, False, False]]), resamples_tasks=True) == (1.0, 1.0, 1.0)
