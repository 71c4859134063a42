from __future__ import annotations

import numpy as np
import pytest

from benchmarks.paper.common.intervals import bootstrap, bootstrap_tasks


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
    alone, copied = bootstrap(one), bootstrap(np.concatenate([one, one, one]))
    assert copied == pytest.approx(alone, abs=1e-3)
    apart = bootstrap(np.stack([np.zeros((4, 5)), np.ones((4, 5))]))
    assert (apart.low, apart.mean, apart.high) == (0.0, 0.5, 1.0)


def test_only_selected_tasks_count_and_runs_have_equal_weight() -> None:
    values = np.zeros((2, 3, 4))
    values[0, 0] = 1.0
    counts = np.array([[True, False, False], [True, True, True]])
    assert bootstrap(values, counts).mean == 0.5


def test_the_interval_for_other_tasks_is_as_wide_as_tasks_differ() -> None:
    """A few tasks determine the mean, so it is precise for these tasks and imprecise for other tasks of this kind."""
    values = np.zeros((46, 50))
    values[:3] = 1.0
    whole, others = bootstrap(values[np.newaxis]), bootstrap_tasks(values)
    assert whole == (3 / 46, 3 / 46, 3 / 46) and others.mean == pytest.approx(3 / 46)
    error = np.sqrt(3 / 46 * 43 / 46 / 46)
    assert others.high - others.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    alike = (np.random.default_rng(3).random((40, 50)) < 0.5).astype(float)
    assert bootstrap_tasks(alike).high - alike.mean() == pytest.approx(
        1.96 * np.sqrt(alike.mean(axis=1).var() / 40 + 0.25 / 2000), rel=0.15
    )
