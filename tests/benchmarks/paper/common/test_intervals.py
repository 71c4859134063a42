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


def test_the_width_of_the_interval_agrees_with_the_standard_error() -> None:
    rng = np.random.default_rng(1)
    values = (rng.random((1, 40, 50)) < 0.7).astype(float)
    interval = bootstrap(values)
    assert interval.mean == pytest.approx(values.mean())
    error = np.sqrt(values.var(axis=2).mean() / 2000)  # queries are resampled within tasks
    assert interval.mean - interval.low == pytest.approx(1.96 * error, rel=0.1)
    assert interval.high - interval.mean == pytest.approx(1.96 * error, rel=0.1)


def test_runs_that_differ_widen_the_interval_and_equal_ones_do_not() -> None:
    one = (np.random.default_rng(2).random((1, 40, 50)) < 0.5).astype(float)
    for resamples_tasks in (False, True):
        alone = bootstrap(one, resamples_tasks=resamples_tasks)
        copied = bootstrap(np.concatenate([one, one, one]), resamples_tasks=resamples_tasks)
        assert copied == pytest.approx(alone, abs=1e-3)
    apart = bootstrap(np.stack([np.zeros((4, 5)), np.ones((4, 5))]))
    assert (apart.low, apart.mean, apart.high) == (0.0, 0.5, 1.0)


def test_only_selected_tasks_count_and_runs_have_equal_weight() -> None:
    values = np.zeros((2, 3, 4))
    values[0, 0] = 1.0
    counts = np.array([[True, False, False], [True, True, True]])
    assert bootstrap(values, counts).mean == 0.5


def test_a_resample_without_a_task_that_counts_is_left_out() -> None:
    values = np.zeros((1, 3, 4))
    values[0, 0] = 1.0
    assert bootstrap(values, np.array([[True, False, False]]), resamples_tasks=True) == (1.0, 1.0, 1.0)


def test_the_interval_for_other_tasks_is_as_wide_as_tasks_differ() -> None:
    """A few tasks determine the mean, so it is precise for these tasks and imprecise for other tasks of this kind."""
    values = np.zeros((1, 46, 50))
    values[0, :3] = 1.0
    whole, others = bootstrap(values), bootstrap(values, resamples_tasks=True)
    assert whole == (3 / 46, 3 / 46, 3 / 46) and others.mean == pytest.approx(3 / 46)
    error = np.sqrt(3 / 46 * 43 / 46 / 46)
    assert others.high - others.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    alike = (np.random.default_rng(3).random((1, 40, 50)) < 0.5).astype(float)
    assert bootstrap(alike, resamples_tasks=True).high - alike.mean() == pytest.approx(
        1.96 * np.sqrt(alike.mean(axis=2).var() / 40 + 0.25 / 2000), rel=0.15
    )
