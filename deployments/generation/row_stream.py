"""Stream the deltas of one row from a Worker, and start again on another Worker where that is possible.

`deployments.calls.heartbeat` explains when a Worker counts as dead.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments.auth.quotas import TokenUsage
from deployments.calls.deadlines import seconds_until
from deployments.calls.heartbeat import HEARTBEAT_TIMEOUT_S, StreamEnd
from deployments.calls.retries import AttemptCounter
from deployments.calls.worker_client import WorkerClient
from deployments.generation.request_limits import prompt_tokens
from deployments.observability.request_context import RequestContext
from gpu_worker.errors import AdapterLoadFailed, EngineFull, WaitedTooLong
from gpu_worker.request.request import Delta, Job

WORKER_GRACE_S = 5.0  # for a step of the engine, and the way back
# The server's own reasons not to start a job: its prompt is not charged.
NO_ROOM = (EngineFull, WaitedTooLong, AdapterLoadFailed, BackPressureError, DeploymentUnavailableError)


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """`silence_s`: without any item, once the first has arrived. `grace_s`: that a Worker may be late."""

    silence_s: float = HEARTBEAT_TIMEOUT_S
    grace_s: float = WORKER_GRACE_S


STREAM_LIMITS = StreamLimits()


@dataclass(frozen=True, slots=True)
class RowStream:
    """One row of a request: which job it is, what it is charged to, and how long it may take."""

    worker: WorkerClient
    job: Job
    index: int  # of the row in the answer
    question: int  # of the prompt in the request
    usage: TokenUsage
    context: RequestContext
    deadline: float
    limits: StreamLimits

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta | None]]:
        """Yield (index, delta), and (index, None) for each heartbeat. Leaving cancels the job at the Worker.

        A job whose Worker died is sent again, unless a delta was yielded already.
        Raises: PoisonRequest after the third Worker died, DeadlineExceeded, and what a Worker raises.
        """
        failures, has_yielded = AttemptCounter(), False
        while True:
            attempt = _Attempt(self)
            try:
                while not isinstance(delta := await attempt.next(), StreamEnd):
                    has_yielded = has_yielded or delta is not None
                    yield self.index, delta
                return
            except Exception as exc:
                if has_yielded:
                    raise
                failures.add(exc)
            finally:
                attempt.cancel()

    async def collect(self) -> list[Delta]:
        """Return all deltas. A job whose Worker died is sent again, wherever that happened. Raises: as `deltas`."""
        failures = AttemptCounter()
        while True:
            attempt, kept = _Attempt(self), list[Delta]()
            try:
                while not isinstance(delta := await attempt.next(), StreamEnd):
                    if delta is not None:
                        kept.append(delta)
                return kept
            except Exception as exc:
                failures.add(exc)
            finally:
                attempt.cancel()


class _Attempt:
    """One call to a Worker. A repeated call is charged in place of the first."""

    def __init__(self, row: RowStream) -> None:
        self._row = row
        job = replace(row.job, time_left_s=seconds_until(row.deadline))
        row.usage.sent(job.request_id, row.question, prompt_tokens(job.prompt))
        self._stream = row.worker.stream(job)

    def cancel(self) -> None:
        self._stream.cancel()

    async def next(self) -> Delta | StreamEnd | None:
        """Return the next delta, None for a heartbeat, or the end. Charge and record a delta."""
        row = self._row
        try:
            delta = await self._stream.next(row.deadline + row.limits.grace_s)  # the Worker is in time, unless it hangs
        except NO_ROOM:
            row.usage.not_started(row.job.request_id)
            raise
        if isinstance(delta, Delta):
            row.usage.saw(row.job.request_id, row.question, delta.num_prompt_tokens, delta.num_new_tokens)
            row.context.record_delta(row.index, delta)
        return delta
