"""vLLM's own metrics, through the exporter that also has those of the application."""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger


class PlanStatLogger(RayPrometheusStatLogger):  # type: ignore[misc]
    """All of vLLM's metrics but one: its list of running adapters, whose label would be new for each set of plans."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gauge_lora_info = None
