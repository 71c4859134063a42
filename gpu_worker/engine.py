"""The interface between a Worker and its engine.

Two engines implement it: `gpu_worker.native.engine` and `gpu_worker.vllm.engine`. They differ in how rows are computed;
what a call makes of a row is the same, and stands here. The tests in `tests/gpu_worker/conformance` run over both
engines and define the meaning.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from gpu_worker.front.calls import CompletionSink, Prober, wait_for_first_logits
from gpu_worker.front.delta_stream import Events, StreamPace, deltas
from gpu_worker.front.engine_status import EngineStatus
from gpu_worker.front.fair_threads import FairThreads
from gpu_worker.front.preprocess import RequestPreprocessor
from gpu_worker.front.request.request import Completion, Delta, Job
from gpu_worker.front.row import Row, Sink
from gpu_worker.front.tokenizing import Tokenizing
from lora_store.adapter import Shapes

T = TypeVar("T")

_PREPARING_THREADS = 4  # a long prompt holds one of them for as long as it is tokenized


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """The health of an engine. An engine that is not alive never recovers; its process must be replaced."""

    is_alive: bool
    busy_s: float = 0.0  # duration of the step or command in progress; a large value means that it hangs
    failure: str | None = None  # the error that ended the engine


class InferenceEngine(ABC):
    """One base model that answers many jobs in one batch, each with its own plan of adapters.

    Weights come from the `fetch` that the engine was started with, by digest, when a job needs them. A job never sees
    weights change: it keeps its adapters until it ends. All methods belong to the event loop in which the engine was
    started. After the engine has ended they raise EngineStopped.

    `tokenizer`: tokenizes for clients that only count or read tokens. `num_missing_kernels`: compiled kernels that are
    missing and replaced by slower code.
    """

    def __init__(
        self,
        prepare: RequestPreprocessor,
        *,
        dtype: torch.dtype,
        max_waiting: int,
        stream_interval_ms: float,
        niceness: int,
        num_missing_kernels: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`dtype`: of the products. `niceness`: of the engine's thread. `clock`: that of deadlines."""
        self._preprocess, self._clock = prepare, clock
        self.num_missing_kernels = num_missing_kernels
        self._pace = StreamPace(stream_interval_ms)
        self._prober = Prober(self._first_logits, self._load, dtype)
        self.tokenizer = Tokenizing(prepare, max_waiting=max_waiting, niceness=niceness)
        self._preparing = FairThreads(
            "prepare",
            num_threads=_PREPARING_THREADS,
            max_calls=max_waiting + _PREPARING_THREADS,
            full=f"the queue is full ({max_waiting} requests); retry later",
        )

    @property
    @abstractmethod
    def module_shapes(self) -> Shapes:
        """(out, in) of every module an adapter may target, by the base model's module path; of fused experts also their
        number."""

    async def stream(self, job: Job, heartbeat_interval_s: float | None = None) -> AsyncGenerator[Delta | None]:
        """Yield None once the job has arrived, then new text: the first at once, later texts at intervals.

        After `heartbeat_interval_s` without text yield None, also while the job is prepared and its grammar compiled.
        Leaving the iterator early cancels the job.
        Raises: the error of this job, a GpuWorkerError.
        """
        arrived = self._clock()
        yield None
        submitting = asyncio.create_task(self._submit_all([job], arrived=arrived))
        try:
            while not (await asyncio.wait([submitting], timeout=heartbeat_interval_s))[0]:
                yield None
            [(_, events)] = submitting.result()
            async with aclosing(deltas(events, self._pace, heartbeat_interval_s)) as found:
                async for delta in found:
                    yield delta
        finally:
            submitting.cancel()  # has no effect once the row is queued
            if submitting.done() and not submitting.cancelled() and submitting.exception() is None:
                self._cancel([row for row, _ in submitting.result()])

    async def generate(self, jobs: Sequence[Job]) -> list[Completion | Exception]:
        """Return each job's whole answer or error, in order. The jobs enter the queue together.

        Cancelling the call cancels all unfinished jobs. Raises: EngineStopped.
        """
        answers = [CompletionSink() for _ in jobs]
        prepared = await self._prepare_all(jobs, answers)
        for outcome, answer in zip(prepared, answers, strict=True):
            if isinstance(outcome, Exception):
                answer(outcome)
        rows = [outcome for outcome in prepared if isinstance(outcome, Row)]
        self._submit(rows)
        try:
            waiting = [asyncio.wrap_future(answer.future) for answer in answers]
            ended = await asyncio.gather(*waiting, return_exceptions=True)
        except asyncio.CancelledError:
            self._cancel(rows)
            raise
        return [_without_exits(outcome) for outcome in ended]

    async def probe(self, weights_digests: Sequence[str]) -> list[float | Exception]:
        """Return how far each adapter moves the base model's output on a fixed prompt, relative to its largest value.

        A shift within rounding is 0.0; an adapter that cannot be probed gets its error.
        """
        return await self._prober.shifts(weights_digests)

    @abstractmethod
    async def forget(self, weights_digests: Collection[str]) -> bool:
        """Drop these weights from the device and host memory. Return whether they are all gone.

        Weights in use are dropped when the last job that uses them ends.
        """

    @abstractmethod
    async def status(self) -> EngineStatus:
        """Return the state between two steps."""

    @abstractmethod
    async def expected(self) -> frozenset[str]:
        """Return the weights digests on the device and those that waiting jobs will bring in."""

    @abstractmethod
    def health(self) -> EngineHealth: ...

    @abstractmethod
    def kill(self) -> None:
        """Kill the processes that the engine has started, if any, because this one is about to end itself."""

    @abstractmethod
    def stop(self) -> None:
        """End every job with EngineStopped and release the device. Blocks until that is done."""

    @abstractmethod
    def _submit(self, rows: Sequence[Row]) -> None:
        """Queue prepared rows between the same two steps. A refused row gets its error. Raises: EngineStopped."""

    @abstractmethod
    def _cancel(self, rows: Sequence[Row]) -> None:
        """Cancel those of the rows that have not ended, before the next step."""

    @abstractmethod
    async def _load(self, weights_digests: Collection[str]) -> None:
        """Load these weights into host memory. Return when all loads have ended, also failed ones."""

    def _prepare(
        self, job: Job, sink: Sink, *, capture_first_logits: bool = False, arrived: float | None = None
    ) -> Row:
        """See RequestPreprocessor. May be called from any thread."""
        return self._preprocess(job, sink, capture_first_logits=capture_first_logits, arrived=arrived)

    def _put(self, events: Events) -> Sink:
        """Return a sink that puts a row's events into the queue of a caller in this event loop."""
        return events.put_nowait

    async def _first_logits(self, jobs: Sequence[Job]) -> list[Tensor | Exception]:
        """Return what follows each job's prompt, or its error. Queue all jobs together.

        The native engine returns the logits (V,) float32, vLLM the log probabilities of some ids, always the same.
        Raises: errors of preparing the jobs, such as PromptTooLong, and EngineStopped.
        """
        submitted = await self._submit_all(jobs, capture_first_logits=True)
        try:
            return [await wait_for_first_logits(events) for _, events in submitted]
        finally:
            self._cancel([row for row, _ in submitted])

    async def _submit_all(
        self, jobs: Sequence[Job], *, capture_first_logits: bool = False, arrived: float | None = None
    ) -> list[tuple[Row, Events]]:
        """Queue all jobs between the same two steps. Return each job's row and its queue of events."""
        queues = [Events() for _ in jobs]
        sinks = [self._put(events) for events in queues]
        rows: list[Row] = []
        for outcome in await self._prepare_all(jobs, sinks, capture_first_logits=capture_first_logits, arrived=arrived):
            if isinstance(outcome, Exception):
                raise outcome
            rows.append(outcome)
        self._submit(rows)
        return list(zip(rows, queues, strict=True))

    async def _prepare_all(
        self,
        jobs: Sequence[Job],
        sinks: Sequence[Sink],
        *,
        capture_first_logits: bool = False,
        arrived: float | None = None,
    ) -> list[Row | Exception]:
        """Return each job's row, or why it cannot be prepared. Tenants take turns, prompt by prompt."""

        arrived = self._clock() if arrived is None else arrived

        async def prepare(job: Job, sink: Sink) -> Row:
            await self._preprocess.compile_grammar(job)
            work = partial(self._prepare, job, sink, capture_first_logits=capture_first_logits, arrived=arrived)

            def prepare_or_wait() -> Row | Future[Any]:
                return self._preprocess.begin_prompt(job) or work()

            found = await asyncio.wrap_future(self._preparing.submit(job.tenant, prepare_or_wait))
            if isinstance(found, Row):
                return found
            await asyncio.shield(asyncio.wrap_future(found))  # the prompt of another row, which has a thread
            return await asyncio.wrap_future(self._preparing.submit(job.tenant, work))

        ended = await asyncio.gather(*map(prepare, jobs, sinks), return_exceptions=True)
        return [_without_exits(outcome) for outcome in ended]

    def _close_threads(self) -> None:
        """Prepare and tokenize nothing more. What waits for it fails with EngineStopped."""
        self._preparing.close()
        self.tokenizer.close()


def _without_exits(outcome: T | BaseException) -> T | Exception:
    """Return the outcome, or raise what is no error of a job, such as a cancellation."""
    if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
        raise outcome
    return outcome
