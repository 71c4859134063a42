"""Placement and scaling of one deployment, as the configuration says it and as Serve takes it."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from deployments.json_types import JsonObject


class ScalingSettings(BaseModel):
    """How one deployment is placed, and between which numbers of replicas Serve scales it.

    CPUs are logical: they place replicas, they do not bind cores. A pool of machines is chosen by `num_gpus`, or by a
    custom resource that only its nodes have. Equal bounds are a fixed number of replicas.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: int = Field(default=1, ge=0)  # 0: workers only
    max_replicas: int = Field(default=1, ge=1)
    # How many run first, and again when settings change under load: Serve 2.60 does not keep what runs where this is
    # set. None: the least, and of what may scale to zero one, so that a model that cannot be loaded is seen at once.
    initial_replicas: int | None = Field(default=None, ge=0)
    num_cpus: float = Field(default=0.2, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    resources: dict[str, float] = {}  # of each replica, by name
    max_ongoing_requests: int = Field(default=64, ge=1)
    max_queued_requests: int = Field(default=1024, ge=-1)  # of one caller, when no replica takes more; -1: no bound
    target_ongoing_requests: float = Field(default=32, gt=0)
    upscale_delay_s: float = Field(default=10, ge=0)  # how long more replicas are wanted before they start
    downscale_delay_s: float = Field(default=300, ge=0)  # the same for fewer: a warm bank goes with its worker
    look_back_s: float = Field(default=15, gt=0)  # load is its mean over this time
    metrics_interval_s: float = Field(default=5, gt=0)  # how old the news of it is at most
    health_check_period_s: float = Field(default=10, gt=0)  # how late Serve sees that a replica died, and replaces it
    graceful_shutdown_timeout_s: float = Field(default=600, gt=0)  # a replica that goes ends its streams first

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
                raise ValueError(f"{name!r}: {amount} is no custom resource; CPUs and GPUs are num_cpus and num_gpus")
        return resources

    def options(self, policy: JsonObject | None = None) -> JsonObject:
        """The keywords of `Deployment.options`. `policy`: of the autoscaler; None: by ongoing requests."""
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
