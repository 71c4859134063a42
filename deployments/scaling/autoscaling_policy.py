"""Compute the number of workers for the load. Ray pickles this module into Serve's controller: keep imports small."""

from __future__ import annotations

from ray.serve.config import AutoscalingContext

from deployments.json_types import JsonObject

TARGET_WAITING_TOKENS = 8192  # tokens that wait in one worker; above it Serve adds workers
ONGOING, WAITING_TOKENS = "ongoing_requests", "waiting_tokens"  # keys of a worker's autoscaling stats


class WorkerScaling:
    """A policy of Serve's autoscaler: the larger of two numbers, by requests and by waiting tokens.

    replicas = max((in the engines + queued before them) / target_ongoing_requests, waiting tokens /
    target_waiting_tokens), each a mean over the look-back time. Serve rounds up, and applies delays and bounds.
    """

    def __init__(self, target_waiting_tokens: float = TARGET_WAITING_TOKENS) -> None:
        self._target_waiting_tokens = target_waiting_tokens

    def __call__(self, context: AutoscalingContext) -> tuple[float, JsonObject]:
        """Return (number of replicas, no state)."""
        if context.current_num_replicas == 0:
            return context.target_num_replicas, {}  # Serve itself starts from zero for any queued request
        stats = context.aggregated_metrics or {}
        ongoing = sum(stats.get(ONGOING, {}).values()) + context.total_queued_requests
        tokens = sum(stats.get(WAITING_TOKENS, {}).values())
        return max(ongoing / context.config.target_ongoing_requests, tokens / self._target_waiting_tokens), {}
