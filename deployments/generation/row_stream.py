"""The rows of a request: their time limits, their charges, and the deltas of all as one stream.

`deployments.calls.worker_client` explains when a Worker counts as dead. If possible, the row then starts again on
another Worker.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, replace
from typing import TypeVar

from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments.auth.authenticator import TokenUsage
from deployments.background import limit_time
from deployments.calls.serve_calls import AttemptCounter
from deployments.calls.worker_client import HeartbeatStream, StreamEnd, Workers
from deployments.generation.planner import prompt_tokens
from deployments.observability.request_context import RequestContext
from gpu_worker.errors import AdapterLoadFailed, DeadlineExceeded, EngineFull, WaitedTooLong
from gpu_worker.front.request.request import Delta, Job

WORKER_GRACE_S = 5.0  # for a step of the engine and the transport
# The server did not start the job, so its prompt is not charged.
NO_ROOM = (EngineFull, WaitedTooLong, AdapterLoadFailed, BackPressureError, DeploymentUnavailableError)
T = TypeVar("T")


def compute_deadline(arrived_at: float, timeout_s: float | None, max_request_s: float) -> float:
    """Return the arrival plus the time that the client allows, at most the time that the server allows."""
    return arrived_at + (max_request_s if timeout_s is None else min(timeout_s, max_request_s))


def seconds_until(deadline: float) -> float:
    """Return the time left, which may be negative: other machines are sent this, as no two share a clock."""
    return deadline - time.monotonic()


def within(deadline: float) -> AbstractAsyncContextManager[None]:
    """Bound the block by the deadline. Raises: DeadlineExceeded."""
    return limit_time(asyncio.timeout(seconds_until(deadline)), lambda: DeadlineExceeded(0))


@dataclass(frozen=True, slots=True)
class RowStream:
    """One row of a request: its job, its charge, and its time limit."""

    workers: Workers
    job: Job
    index: int  # index of the row in the answer
    question: int  # index of the prompt in the request
    usage: TokenUsage
    context: RequestContext
    deadline: float
    grace_s: float  # tolerated delay of a Worker

    async def deltas(self, restart: Callable[[], None] | None = None) -> AsyncGenerator[tuple[int, Delta]]:
        """Yield (index, delta). Leaving cancels the job at the Worker.

        A job whose Worker died is sent to another one, and charged once. If deltas have been yielded, this happens only
        with `restart`, which is called before the first delta is yielded again.
        Raises: PoisonRequest after the third Worker died, DeadlineExceeded, WorkerStarting, and what a Worker raises.
        """
        failures, usage, name = AttemptCounter(), self.usage, self.job.request_id
        last: Delta | None = None
        while True:
            stream: HeartbeatStream[Delta] | None = None
            has_ended = False
            try:
                usage.sent(name, self.question, prompt_tokens(self.job.prompt, self.job.tools))
                workers = self.workers.named(self.job.plan.base_model)
                async with within(self.deadline):
                    await workers.ready()
                stream = workers.client.stream(replace(self.job, time_left_s=seconds_until(self.deadline)))
                until = self.deadline + self.grace_s  # the Worker keeps the deadline unless it hangs
                while not isinstance(delta := await stream.next(until), StreamEnd):
                    if delta is None:  # a heartbeat
                        continue
                    last = delta
                    self.context.record_delta(self.index, delta)
                    yield self.index, delta
                has_ended = True
                return
            except Exception as exc:
                if isinstance(exc, NO_ROOM):
                    usage.not_started(name)
                if last is not None and restart is None:
                    raise
                failures.raise_unless_repeatable(exc)
                if restart is not None:
                    restart()
            finally:
                if stream is None:
                    usage.not_started(name)
                elif not has_ended:
                    stream.cancel()
                if last is not None:
                    usage.saw(name, self.question, last.num_prompt_tokens, last.num_new_tokens)

    async def collect(self, check: Callable[[int, int], None]) -> list[Delta]:
        """Return all deltas. A job whose Worker died is sent again, wherever that happened.

        `check`: called with the row's index and the number of log probabilities kept so far; it may refuse more.
        Raises: as `deltas` and `check`.
        """
        kept: list[Delta] = []
        num_logprobs = 0
        async with aclosing(self.deltas(restart=kept.clear)) as deltas:
            async for _, delta in deltas:
                num_logprobs = (num_logprobs if kept else 0) + delta.num_logprobs  # a restart cleared `kept`
                kept.append(delta)
                if num_logprobs:
                    check(self.index, num_logprobs)
        return kept


def merge(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    """Return one stream of the items of all, as they arrive. An error of one stream ends all; leaving closes all."""
    return streams[0] if len(streams) == 1 else _merged(streams)


async def _merged(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    waiting = {_start_next(stream): place for place, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                place = waiting.pop(task)
                for item in task.result():
                    yield item
                    waiting[_start_next(streams[place])] = place
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.gather(*[stream.aclose() for stream in streams], return_exceptions=True)


def _start_next(stream: AsyncGenerator[T]) -> asyncio.Task[tuple[T, ...]]:
    """Start a task for the stream's next item. It returns an empty tuple at the end."""

    async def step() -> tuple[T, ...]:
        try:
            return (await anext(stream),)
        except StopAsyncIteration:
            return ()

    return asyncio.create_task(step())
