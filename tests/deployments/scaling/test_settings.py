from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from deployments.scaling.settings import ScalingSettings


def test_min_replicas_above_max_replicas_is_refused() -> None:
    with pytest.raises(ValidationError):
        ScalingSettings(min_replicas=3, max_replicas=2)


def test_equal_replica_counts_are_fixed() -> None:
    fixed = ScalingSettings(
        min_replicas=2, max_replicas=2, num_cpus=0.5, num_gpus=1, resources={"l4": 1}, max_ongoing_requests=7
    )
    assert fixed.options() == {
        "num_replicas": 2,
        "max_ongoing_requests": 7,
        "max_queued_requests": 1024,
        "health_check_period_s": 10,
        "graceful_shutdown_timeout_s": 600,
        "ray_actor_options": {"num_cpus": 0.5, "num_gpus": 1, "resources": {"l4": 1}},
    }


@pytest.mark.parametrize(("least", "initial", "started"), [(0, None, 1), (0, 0, 0), (2, None, None), (0, 3, 3)])
def test_initial_replicas_are_one_if_the_minimum_is_zero(least: int, initial: int | None, started: int | None) -> None:
    scaling = ScalingSettings(min_replicas=least, max_replicas=3, initial_replicas=initial)
    assert scaling.options()["autoscaling_config"].get("initial_replicas") == started


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"initial_replicas": 2}, r"initial_replicas \(2\) is not between"),
        ({"metrics_interval_s": 5, "look_back_s": 5}, "must be above metrics_interval_s"),
        ({"resources": {"GPU": 1}}, "num_gpus"),
        ({"resources": {"l4": 0}}, "'l4'"),
        ({"num_cores": 2}, "num_cores"),
    ],
    ids=str,
)
def test_settings_that_serve_cannot_apply_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ScalingSettings.model_validate(settings)


def test_the_applications_own_policy_is_combined_with_the_bounds() -> None:
    policy = {"policy_function": "somewhere:Policy"}
    assert ScalingSettings(max_replicas=2).options(policy)["autoscaling_config"]["policy"] == policy
    assert "policy" not in ScalingSettings(max_replicas=2).options()["autoscaling_config"]
