"""Shadows: copies of requests that a version under trial answers. The answers are measured and dropped."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from deployments.api import error_table
from deployments.api.responses import Planned
from deployments.background import Background
from deployments.calls.worker_client import HeartbeatStream, StreamEnd, Workers
from deployments.observability.request_metrics import RequestMetrics
from deployments.observability.worker_metrics import shadow_tenant
from gpu_worker.front.request.request import Delta, Job

logger = logging.getLogger(__name__)
MAX_SHADOWS = 8  # at once in one Ingress replica, so that they cannot fill the workers' queues
DROPPED = "dropped"  # instead of a status


class Shadows:
    """Runs shadows in the background. Nothing that happens to one reaches a client.

    No key is charged for it. It runs as a pseudo-tenant of the version's owner, and counts for the owner's usage if the
    request is the owner's too. With API keys, one owner may run at most as many as remain free.
    """

    def __init__(
        self, workers: Workers, background: Background, metrics: RequestMetrics, *, has_keys: bool = False
    ) -> None:
        self._workers, self._background, self._metrics, self._has_keys = workers, background, metrics, has_keys
        self._running: Counter[str] = Counter()  # by owner

    def start(self, jobs: Sequence[Job], plans: Sequence[Planned], deadline: float) -> None:
        """Answer a copy of each job whose plan has a shadow. `jobs` has one entry per plan."""
        for job, planned in zip(jobs, plans, strict=True):
            if planned.shadow is None:
                continue
            live = {row.ref for row in planned.plan.adapters}
            tried = [row.ref for row in planned.shadow.adapters if row.ref not in live]
            if not tried:
                continue
            owner = tried[0].tenant
            copy = replace(
                job,
                request_id=f"{job.request_id}-shadow",
                plan=planned.shadow,
                tenant=shadow_tenant(owner, sender=job.tenant),
            )
            digests = [ref.short_digest for ref in tried]
            num_free = MAX_SHADOWS - self._running.total()
            if num_free <= (self._running[owner] if self._has_keys else 0):
                self._record(digests, DROPPED, None)
                continue
            self._running[owner] += 1
            self._background.start(self._run(copy, owner, digests, deadline), "a shadow")

    async def _run(self, job: Job, owner: str, digests: Sequence[str], deadline: float) -> None:
        began, status, has_ended = time.monotonic(), 200, False
        stream: HeartbeatStream[Delta] | None = None
        try:
            stream = self._workers.stream(replace(job, time_left_s=deadline - began))
            while not isinstance(await stream.next(deadline), StreamEnd):
                pass
            has_ended = True
        except Exception as exc:
            status, body = error_table.describe(exc)
            logger.info("the shadow %s failed: %s", job.request_id, body["error"]["message"])
        finally:
            self._running -= Counter([owner])  # forgets those without any
            if stream is not None and not has_ended:
                stream.cancel()
        self._record(digests, str(status), time.monotonic() - began)

    def _record(self, digests: Sequence[str], status: str, seconds: float | None) -> None:
        for digest in digests:
            self._metrics.record_version(digest, "shadow", status, seconds)
