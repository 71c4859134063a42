"""Stream the deltas of one row from a Worker, and start again on another Worker where that is possible.

Ray raises an error when a replica dies. A node that disappears raises none for minutes, so Workers send a heartbeat
(None) every few seconds, and a stream without any item for `silence_s` counts as one whose replica died.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace
from typing import Any, Final

from grpc.aio import AioRpcError
from ray.exceptions import ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.auth.quotas import TokenUsage
from deployments.calls.deadlines import seconds_until
from deployments.calls.heartbeat import SILENCE_S
from deployments.calls.retries import AttemptCounter
from deployments.calls.transport import direct
from deployments.generation.request_limits import prompt_tokens
from deployments.observability.request_context import RequestContext
from gpu_worker.errors import AdapterLoadFailed, DeadlineExceeded, EngineFull, WaitedTooLong
from gpu_worker.request.request import Delta, Job

WORKER_GRACE_S = 5.0  # for a step of the engine, and the way back
# The server's own reasons not to start a job: its prompt is not charged.
NO_ROOM = (EngineFull, WaitedTooLong, AdapterLoadFailed, BackPressureError, DeploymentUnavailableError)
_END: Final = object()


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """`silence_s`: without any item, once the first has arrived. `grace_s`: that a Worker may be late."""

    silence_s: float = SILENCE_S
    grace_s: float = WORKER_GRACE_S


STREAM_LIMITS = StreamLimits()


@dataclass(frozen=True, slots=True)
class RowStream:
    """One row of a request: which job it is, what it is charged to, and how long it may take."""

    worker: DeploymentHandle
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
                while (delta := await attempt.next()) is not _END:
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
                while (delta := await attempt.next()) is not _END:
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
        self._response = direct(row.worker).options(stream=True).stream.remote(job)
        self._items: AsyncIterator[Delta | None] = aiter(self._response)
        self._hears_until = float("inf")  # the first item may take any time: it needs a replica

    def cancel(self) -> None:
        self._response.cancel()

    async def next(self) -> Any:
        """Return the next delta, None for a heartbeat, or _END. Charge and record a delta."""
        row = self._row
        try:
            delta = await self._received()
        except NO_ROOM:
            row.usage.not_started(row.job.request_id)
            raise
        if isinstance(delta, Delta):
            row.usage.saw(row.job.request_id, row.question, delta.num_prompt_tokens, delta.num_new_tokens)
            row.context.record_delta(row.index, delta)
        return delta

    async def _received(self) -> Any:
        limits = self._row.limits
        deadline = self._row.deadline + limits.grace_s  # the Worker ends the job in time, unless it hangs
        until = min(deadline, self._hears_until)
        try:
            async with asyncio.timeout(seconds_until(until)) as timeout:
                item = await anext(self._items, _END)
        except TimeoutError as exc:
            if not timeout.expired():
                raise
            if until == deadline:
                raise DeadlineExceeded(0) from exc
            raise ActorUnavailableError(f"no heartbeat for {limits.silence_s:.0f} s", None) from exc
        except AioRpcError as exc:  # Serve 2.60 translates only UNAVAILABLE
            raise ActorUnavailableError(f"the call was broken off: {exc.code().name}", None) from exc
        except asyncio.CancelledError as exc:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise ActorUnavailableError("the replica shut down and gave up the call", None) from exc
        self._hears_until = time.monotonic() + limits.silence_s
        return item
