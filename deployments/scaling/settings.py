"""Placement and scaling of one deployment: the settings, and the options that Serve takes."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from deployments.json_types import JsonMapping, JsonObject


class ScalingSettings(BaseModel):
    """Placement of one deployment, and the range of its number of replicas.

    CPUs are logical: they place replicas and do not bind cores. Choose a group of machines by `num_gpus`, or by a
    custom resource that only these nodes have. Equal bounds give a fixed number of replicas.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: int = Field(default=1, ge=0)  # 0: workers only
    max_replicas: int = Field(default=1, ge=1)
    # The number at the start, and again when settings change: Serve 2.60 drops the current number if this is set.
    # None: the minimum, but one if the minimum is zero, so that a model that cannot be loaded is noticed at once.
    initial_replicas: int | None = Field(default=None, ge=0)
    num_cpus: float = Field(default=0.2, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    resources: dict[str, float] = {}  # per replica, by name
    max_ongoing_requests: int = Field(default=64, ge=1)
    max_queued_requests: int = Field(default=1024, ge=-1)  # per caller, if all replicas are full; -1: no limit
    target_ongoing_requests: float = Field(default=32, gt=0)
    upscale_delay_s: float = Field(default=10, ge=0)  # how long the load must ask for more replicas
    downscale_delay_s: float = Field(default=300, ge=0)  # the same for fewer; each removed worker loses a warm bank
    look_back_s: float = Field(default=15, gt=0)  # the load is a mean over this time
    metrics_interval_s: float = Field(default=5, gt=0)  # maximum age of a load report
    health_check_period_s: float = Field(default=10, gt=0)  # maximum delay before Serve replaces a dead replica
    graceful_shutdown_timeout_s: float = Field(default=600, gt=0)  # time for a removed replica to end its streams

    def changed(self, given: JsonMapping) -> JsonObject:
        """Return the settings that differ from the class's defaults, overridden by `given`."""
        return {name: getattr(self, name) for name in self.model_fields_set} | dict(given)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) is above max_replicas ({self.max_replicas})")
        if self.initial_replicas is not None and not self.min_replicas <= self.initial_replicas <= self.max_replicas:
            raise ValueError(f"initial_replicas ({self.initial_replicas}) is not between min_ and max_replicas")
        if self.metrics_interval_s >= self.look_back_s:
            raise ValueError(f"look_back_s ({self.look_back_s}) must be above metrics_interval_s")
        return self

    @field_validator("resources")
    @classmethod
    def _named_like_resources(cls, resources: dict[str, float]) -> dict[str, float]:
        for name, amount in resources.items():
            if name in ("CPU", "GPU", "memory") or amount <= 0:
                raise ValueError(
                    f"{name!r}: {amount} is not a custom resource; set CPUs and GPUs by num_cpus and num_gpus"
                )
        return resources

    def options(self, policy: JsonObject | None = None) -> JsonObject:
        """Return the keywords of `Deployment.options`. `policy`: of the autoscaler; None: by ongoing requests."""
        options: JsonObject = {
            "max_ongoing_requests": self.max_ongoing_requests,
            "max_queued_requests": self.max_queued_requests,
            "health_check_period_s": self.health_check_period_s,
            "graceful_shutdown_timeout_s": self.graceful_shutdown_timeout_s,
            "ray_actor_options": {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus, "resources": self.resources},
        }
        if self.min_replicas == self.max_replicas:
            return options | {"num_replicas": self.min_replicas}
        autoscaling: JsonObject = {
            "min_replicas": self.min_replicas,
            "max_replicas": self.max_replicas,
            "target_ongoing_requests": self.target_ongoing_requests,
            "upscale_delay_s": self.upscale_delay_s,
            "downscale_delay_s": self.downscale_delay_s,
            "look_back_period_s": self.look_back_s,
            "metrics_interval_s": self.metrics_interval_s,
        }
        if self.initial_replicas is not None or self.min_replicas == 0:
            autoscaling["initial_replicas"] = 1 if self.initial_replicas is None else self.initial_replicas
        if policy is not None:
            autoscaling["policy"] = policy
        return options | {"autoscaling_config": autoscaling}
