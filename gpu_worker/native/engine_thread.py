"""Run an Engine on its own thread and stream from it with asyncio."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing, contextmanager
from functools import partial
from typing import TypeVar

from torch import Tensor

from gpu_worker.errors import EngineStopped
from gpu_worker.front.delta_stream import Events, StreamPace, deltas
from gpu_worker.front.engine_status import EngineStatus
from gpu_worker.front.request.request import Completion, Delta, Job
from gpu_worker.front.row import Row, Sink
from gpu_worker.native.loop import Engine
from gpu_worker.native.openmp import thread_team_releaser

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class EngineThread:
    """The thread that steps an engine. Commands reach it through a queue and run between steps.

    Build the engine with `run_on_short_lived_thread`.
    `niceness`: nice value of this thread only, so that request handling on the same cores has priority.
    """

    def __init__(self, engine: Engine, *, stream_interval_ms: float = 25.0, niceness: int = 0) -> None:
        self.engine = engine
        self._niceness = niceness
        self._pace = StreamPace(stream_interval_ms)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # orders the last command before the end of the thread
        self._is_closed = False
        self._stopping = False
        self._busy_since: float | None = None
        self.failure: Exception | None = None  # the error that ended the thread, if any
        self._end_team = thread_team_releaser()
        engine.on_loaded = lambda: self._commands.put(_no_op)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stream(self, job: Job) -> AsyncGenerator[Delta]:
        """Yield the first text at once, then one delta per interval.

        Leaving the iterator early cancels the request. Raises: the engine's error for this job.
        """
        async with aclosing(self.stream_with_heartbeats(job, None)) as events:
            async for delta in events:
                if delta is not None:
                    yield delta

    async def stream_with_heartbeats(
        self, job: Job, heartbeat_interval_s: float | None
    ) -> AsyncGenerator[Delta | None]:
        """Like `stream`, but yield None as a heartbeat: first of all, and after `heartbeat_interval_s` without text."""
        arrived = self.engine.clock()
        yield None
        [(row, events)] = await self._submit_all([job], arrived=arrived)
        try:
            async with aclosing(deltas(events, self._pace, heartbeat_interval_s)) as stream:
                async for delta in stream:
                    yield delta
        finally:
            self._commands.put(lambda: self.engine.cancel(row))

    async def complete(self, job: Job) -> tuple[Completion, Delta]:
        """Return the whole answer and its last delta."""
        parts = [delta async for delta in self.stream(job)]
        return Completion.joined(parts), parts[-1]

    def prepare(self, job: Job, sink: Sink) -> Row:
        """See `RequestPreprocessor`. May be called from any thread."""
        return self.engine.prepare(job, sink)

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue prepared rows between the same two steps. Raises: EngineStopped."""
        self._command(lambda: self._submit(rows))

    def cancel(self, rows: Sequence[Row]) -> None:
        """Cancel those of the rows that have not ended, before the next step."""
        for row in rows:
            self._commands.put(partial(self.engine.cancel, row))

    async def first_logits(self, jobs: Sequence[Job]) -> list[Tensor | Exception]:
        """Return the logits (V,) float32 after each job's prompt, or its error. Queue all jobs together.

        Raises: errors of preparing the jobs, such as PromptTooLong, and EngineStopped.
        """
        submitted = await self._submit_all(jobs, capture_first_logits=True)
        try:
            return [await _first_logits(events) for _, events in submitted]
        finally:
            self.cancel([row for row, _ in submitted])

    async def preload(self, digests: Collection[str]) -> None:
        """Load these weights and return when all loads have ended, also failed ones. Raises: EngineStopped."""
        loads = await self._run_on_engine(lambda: self.engine.preload(digests))
        await asyncio.gather(*[asyncio.wrap_future(load) for load in loads], return_exceptions=True)

    async def forget(self, digests: Collection[str]) -> bool:
        """See `Engine.forget`. Raises: EngineStopped."""
        return await self._run_on_engine(lambda: self.engine.forget(digests))

    async def status(self) -> EngineStatus:
        """Return the engine's state between two steps. Raises: EngineStopped."""
        return await self._run_on_engine(self.engine.status)

    async def expected(self) -> frozenset[str]:
        """See `Engine.expected`. Raises: EngineStopped."""
        return await self._run_on_engine(self.engine.expected)

    def seconds_busy(self) -> float:
        """Return the duration of the step or command in progress, 0 while idle. A large value means that it hangs."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def is_alive(self) -> bool:
        """Return whether the thread still steps. After it has ended, every request fails with EngineStopped."""
        return self._thread.is_alive() and not self._is_closed

    def stop(self) -> None:
        """End every request with EngineStopped, and end the thread."""
        self._stopping = True
        self._commands.put(_no_op)
        self._thread.join()

    def _command(self, command: Callable[[], None]) -> None:
        """Queue a command for the engine's thread. Raises: EngineStopped if the thread has ended."""
        with self._lock:
            if self._is_closed:
                raise EngineStopped("the engine has stopped")
            self._commands.put(command)

    async def _submit_all(
        self, jobs: Sequence[Job], *, capture_first_logits: bool = False, arrived: float | None = None
    ) -> list[tuple[Row, Events]]:
        """Queue all jobs between the same two steps. Return each job's row and its queue of events."""
        loop = asyncio.get_running_loop()
        queues = [Events() for _ in jobs]

        def prepare(job: Job, events: Events) -> Row:
            def sink(event: Delta | Exception) -> None:
                loop.call_soon_threadsafe(events.put_nowait, event)

            return self.engine.prepare(job, sink, capture_first_logits=capture_first_logits, arrived=arrived)

        for job in jobs:
            if (grammar := self.engine.prepare.grammar_of(job)) is not None:
                await self.engine.grammars.compile(grammar, job.tenant)
        rows = await asyncio.to_thread(lambda: [prepare(*each) for each in zip(jobs, queues, strict=True)])
        self.submit(rows)
        return list(zip(rows, queues, strict=True))

    async def _run_on_engine(self, call: Callable[[], _T]) -> _T:
        """Run `call` on the engine's thread between two steps and return its result. Raises: EngineStopped."""
        result: Future[_T] = Future()

        def run() -> None:
            if not result.set_running_or_notify_cancel():
                return  # the caller has left
            try:
                result.set_result(call())
            except Exception as exc:
                result.set_exception(exc)

        self._command(run)
        return await asyncio.wrap_future(result)

    def _submit(self, rows: Sequence[Row]) -> None:
        for row in rows:
            try:
                self.engine.submit(row)
            except Exception as exc:
                self.engine.send(row, exc)

    def _run(self) -> None:
        os.nice(self._niceness)  # Linux: applies to this thread and those it starts
        try:
            self._step_until_stopped()
        except Exception as exc:
            logger.exception("the engine's thread ends because of an error")
            self.failure = exc
        with self._lock:
            self._is_closed = True
        with self._busy():
            self._end_all()

    def _step_until_stopped(self) -> None:
        idle = True
        while not self._stopping:
            self._run_commands(wait=idle)
            with self._busy():
                idle = not self.engine.step()

    def _run_commands(self, *, wait: bool) -> None:
        """Run the queued commands. If idle, sleep until a command (also of a finished load) or a deadline."""
        if wait:
            if self._commands.empty():
                self._end_team()
            try:
                command = self._commands.get(timeout=self.engine.seconds_to_due)
            except queue.Empty:
                return
            with self._busy():
                command()
        while not self._commands.empty():
            with self._busy():
                self._commands.get()()

    def _end_all(self) -> None:
        """Run the remaining commands, some of which submit requests; then end all requests and loads.

        Each of these may raise on a lost device; the others still run.
        """
        end_requests = partial(self.engine.fail_all, EngineStopped("the engine has stopped"))
        commands: list[Callable[[], None]] = [*self._queued(), end_requests, self.engine.close]
        for command in commands:
            try:
                command()
            except Exception:
                logger.exception("cannot free the resources of the stopping engine")

    def _queued(self) -> Iterator[Callable[[], None]]:
        while not self._commands.empty():
            yield self._commands.get()

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """Count the block in `seconds_busy`."""
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None


def _no_op() -> None:
    """Do nothing: a command that only wakes up the engine's thread."""


async def _first_logits(events: Events) -> Tensor | Exception:
    while True:
        event = await events.get()
        if isinstance(event, Exception):
            return event
        if event.first_logits is not None:
            return event.first_logits
