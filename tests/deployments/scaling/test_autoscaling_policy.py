from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from deployments.scaling.autoscaling_policy import RetrieverScaling, WorkerScaling

TARGET_REQUESTS, TARGET_TOKENS = 10, 1000


def context_of(*ongoing: float, queued: float = 0, tokens: tuple[float, ...] = (), target: int | None = None) -> Any:
    """Return a context with one replica per number of ongoing requests; the first ones report waiting tokens."""
    stats = {"ongoing_requests": dict(enumerate(ongoing)), "waiting_tokens": dict(enumerate(tokens))}
    replicas = [SimpleNamespace() for _ in ongoing]
    return AutoscalingContext(
        deployment_id=None,
        deployment_name="Worker",
        app_name="app",
        current_num_replicas=len(ongoing),
        target_num_replicas=len(ongoing) if target is None else target,
        running_replicas=replicas,
        total_num_requests=sum(ongoing) + queued,
        total_queued_requests=queued,
        aggregated_metrics=lambda: stats,
        raw_metrics=None,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=9,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=AutoscalingConfig(target_ongoing_requests=TARGET_REQUESTS),
    )


@pytest.mark.parametrize(
    ("context", "wanted"),
    [
        (context_of(10), 1),
        (context_of(25), 2.5),
        (context_of(5, 10), 1.5),
        (context_of(0, 0, 0), 0),
        (context_of(5, queued=25), 3),  # requests that no replica accepts count as well
        (context_of(2, tokens=(4000,)), 4),  # few requests, but long ones
        (context_of(40, tokens=(1000,)), 4),
        (context_of(10, 10, tokens=(500, 2500)), 3),
        (context_of(target=2), 2),  # from zero: Serve's decision is kept
    ],
)
def test_the_number_follows_requests_or_waiting_tokens(context: Any, wanted: float) -> None:
    assert WorkerScaling(TARGET_TOKENS)(context) == (wanted, {})


def test_replicas_without_reports_do_not_count() -> None:
    context = context_of(10, 10)
    context.__dict__["aggregated_metrics"] = {}
    assert WorkerScaling(TARGET_TOKENS)(context) == (0, {})


@pytest.mark.parametrize(
    ("busy", "waiting_s", "wanted"),
    [
        ((0.35, 0.35), (0, 0), 1),
        ((0.7, 0.7, 0.7), (0, 0, 0), 3),
        ((1.0,) * 4, (0,) * 4, 4 / 0.7),  # saturated: more than there are
        ((1.0,), (7.0,), 2.4 / 0.7),  # and what waits is to be encoded within five seconds
    ],
)
def test_retrievers_follow_the_busy_time_of_their_encoders(
    busy: tuple[float, ...], waiting_s: tuple[float, ...], wanted: float
) -> None:
    context = context_of()
    context.__dict__["aggregated_metrics"] = {"busy": dict(enumerate(busy)), "waiting_s": dict(enumerate(waiting_s))}
    replicas, state = RetrieverScaling()(context)
    assert (replicas, state) == (pytest.approx(wanted), {})


@pytest.mark.parametrize("stats", [None, {}, {"busy": {}}])
def test_retrievers_that_have_not_reported_are_not_idle(stats: dict[str, Any] | None) -> None:
    context = context_of(target=3)
    context.__dict__["aggregated_metrics"] = stats
    assert RetrieverScaling()(context) == (3, {})
