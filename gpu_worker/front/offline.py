"""Generate whole answers for many jobs, without streaming."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from gpu_worker.front.request.request import Completion, Delta, Job
from gpu_worker.front.row import Row, Sink


class RowEngine(Protocol):
    """Computes rows. `prepare` may be called from any thread."""

    def prepare(self, job: Job, sink: Sink) -> Row: ...
    def submit(self, rows: Sequence[Row]) -> None: ...
    def cancel(self, rows: Sequence[Row]) -> None: ...


class _CompletionSink:
    """The sink of one request. Its future is set when the request ends."""

    def __init__(self) -> None:
        self.future: Future[Completion] = Future()
        self._deltas: list[Delta] = []

    def __call__(self, event: Delta | Exception) -> None:
        if isinstance(event, Exception):
            self.future.set_exception(event)
            return
        self._deltas.append(event)
        if event.finish_reason is not None:
            self.future.set_result(Completion.joined(self._deltas))


async def generate_all(engine: RowEngine, jobs: Sequence[Job]) -> list[Completion | Exception]:
    """Return each job's answer or error, in order. The jobs enter the queue together.

    Cancelling the call cancels all unfinished jobs. Raises: EngineStopped.
    """
    answers = [_CompletionSink() for _ in jobs]
    rows = await asyncio.to_thread(_prepared, engine, jobs, answers)
    engine.submit(rows)
    try:
        waiting = [asyncio.wrap_future(answer.future) for answer in answers]
        ended = await asyncio.gather(*waiting, return_exceptions=True)
    except asyncio.CancelledError:
        engine.cancel(rows)
        raise
    return [_none_but_errors(outcome) for outcome in ended]


def _prepared(engine: RowEngine, jobs: Sequence[Job], answers: Sequence[_CompletionSink]) -> list[Row]:
    """Prepare the jobs and return their rows. Jobs that cannot be prepared get their error as the answer."""
    rows: list[Row] = []
    for job, answer in zip(jobs, answers, strict=True):
        try:
            rows.append(engine.prepare(job, answer))
        except Exception as exc:
            answer(exc)
    return rows


def _none_but_errors(outcome: Completion | BaseException) -> Completion | Exception:
    if isinstance(outcome, Completion | Exception):
        return outcome
    raise outcome
