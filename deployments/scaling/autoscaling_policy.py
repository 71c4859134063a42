"""Compute the numbers of workers and retrievers for the load.

Ray pickles this module into Serve's controller: keep imports small.
"""

from __future__ import annotations

from ray.serve.config import AutoscalingContext

from deployments.json_types import JsonObject

TARGET_WAITING_TOKENS = 8192  # tokens that wait in one worker; above it Serve adds workers
TARGET_BUSY = 0.7  # share of the time in which a Retriever's encoder works; above it texts wait long
DRAIN_S = 5.0  # in which waiting texts are to be encoded
ONGOING, WAITING_TOKENS = "ongoing_requests", "waiting_tokens"  # keys of a worker's autoscaling stats
BUSY, WAITING_S = "busy", "waiting_s"  # keys of a retriever's autoscaling stats


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


class RetrieverScaling:
    """A policy of Serve's autoscaler: as many replicas as keep their encoders busy for `target_busy` of the time.

    replicas = (the encoders' shares of busy time + seconds of work that wait / DRAIN_S) / target_busy. Both are
    measured by each replica, so the texts a second of a replica follow from its encoder, prompts and machine. While no
    replica has reported, the number stays: a replica that is too busy to report is not idle.
    """

    def __init__(self, target_busy: float = TARGET_BUSY) -> None:
        self._target_busy = target_busy

    def __call__(self, context: AutoscalingContext) -> tuple[float, JsonObject]:
        """Return (number of replicas, no state)."""
        stats = context.aggregated_metrics or {}
        if not stats.get(BUSY):
            return context.target_num_replicas, {}
        work = sum(stats.get(BUSY, {}).values()) + sum(stats.get(WAITING_S, {}).values()) / DRAIN_S
        return work / self._target_busy, {}
