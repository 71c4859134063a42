from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import DeploymentID
from ray.serve._private.config import DeploymentConfig, ReplicaConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.config import AutoscalingConfig

from deployments.scaling.settings import ServeOptions, default_options, with_defaults

DEFAULTS = default_options(target_ongoing_requests=9)


def test_a_number_of_replicas_is_the_default_and_a_range_replaces_it() -> None:
    assert with_defaults({}, DEFAULTS)["num_replicas"] == 1
    for no_range in ({"num_replicas": 2}, {"num_replicas": 2, "autoscaling_config": None}):
        options = with_defaults(no_range, DEFAULTS)
        assert options["num_replicas"] == 2 and "autoscaling_config" not in options
    options = with_defaults({"autoscaling_config": {"max_replicas": 3}}, DEFAULTS)
    assert "num_replicas" not in options
    assert options["autoscaling_config"] == DEFAULTS["autoscaling_config"] | {"max_replicas": 3}
    options["ray_actor_options"]["num_gpus"] = 1
    assert "num_gpus" not in with_defaults({}, DEFAULTS)["ray_actor_options"], "defaults are not shared"


@pytest.mark.parametrize(("least", "initial", "started"), [(0, None, 1), (0, 0, 0), (2, None, None), (0, 3, 3)])
def test_initial_replicas_are_one_if_the_minimum_is_zero(least: int, initial: int | None, started: int | None) -> None:
    given = {"min_replicas": least, "max_replicas": 3} | ({} if initial is None else {"initial_replicas": initial})
    options = with_defaults({"autoscaling_config": given}, DEFAULTS)
    assert options["autoscaling_config"].get("initial_replicas") == started


@pytest.mark.parametrize(
    ("given", "started", "after_change"),
    [
        ({"min_replicas": 0}, 1, 1),
        ({"min_replicas": 0, "initial_replicas": None}, 0, 6),
        ({"min_replicas": 1}, 1, 6),
    ],
)
def test_a_change_begins_with_the_initial_replicas_again(
    given: dict[str, int | None], started: int, after_change: int
) -> None:
    options = ServeOptions(with_defaults({"autoscaling_config": given | {"max_replicas": 8}}, DEFAULTS))
    serves = DeploymentAutoscalingState(DeploymentID("Worker", "app"))

    def deploy(version: str, *, num_running: int) -> int:
        """Return the number of replicas that Serve aims at."""
        config = DeploymentConfig(autoscaling_config=AutoscalingConfig(**options.root["autoscaling_config"]))
        replica = ReplicaConfig.create(object)
        info = DeploymentInfo(config, replica, start_time_ms=0, deployer_job_id="", version=version)
        return serves.register(info, num_running)

    assert deploy("args", num_running=0) == started
    assert deploy("other args", num_running=6) == after_change


def test_bounds_and_resources_are_read_from_serves_options() -> None:
    ranged = ServeOptions(with_defaults({"autoscaling_config": {"min_replicas": 2, "max_replicas": 5}}, DEFAULTS))
    assert (ranged.min_replicas, ranged.max_replicas) == (2, 5)
    assert (ranged.num_cpus, ranged.num_gpus, ranged.graceful_shutdown_timeout_s) == (0.2, 0, 600)
    actor = {"num_cpus": 2, "num_gpus": 0.5, "resources": {"l4": 1}}
    fixed = ServeOptions(with_defaults({"num_replicas": 3, "ray_actor_options": actor}, DEFAULTS))
    assert (fixed.min_replicas, fixed.max_replicas, fixed.num_cpus, fixed.num_gpus) == (3, 3, 2, 0.5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"autoscaling_config": {"min_replicas": 3, "max_replicas": 2}}, "max_replicas"),
        ({"autoscaling_config": {"initial_replicas": 2}}, "initial_replicas"),
        ({"ray_actor_options": {"resources": {"GPU": 1}}}, "num_gpus"),
        ({"ray_actor_options": {"resources": {"l4": 0}}}, "'l4'"),
        ({"ray_actor_options": {"num_cores": 2}}, "num_cores"),
        ({"num_cores": 2}, "num_cores"),
        ({"name": "other"}, "name"),
        ({"user_config": {}}, "user_config"),
        ({"max_queued_requests": 0}, "max_queued_requests"),
        ({"ray_actor_options": {"resources": {"l4": "one"}}}, "'l4' must be a number above 0"),
        ({"ray_actor_options": {"resources": None}}, "resources"),
        ({"ray_actor_options": {"resources": ["l4"]}}, "resources"),
        ({"ray_actor_options": {"num_gpus": "1"}}, "num_gpus"),
        ({"ray_actor_options": {1: 2}}, "unknown"),
        ({"autoscaling_config": {"policy": {"policy_function": "no_such_module:scale"}}}, "no_such_module"),
    ],
    ids=str,
)
def test_options_that_serve_cannot_apply_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ServeOptions(with_defaults(given, DEFAULTS))
