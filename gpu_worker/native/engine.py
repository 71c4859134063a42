"""The native engine: a loop of steps on its own thread in this process."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from gpu_worker.bank.load_threads import use_one_thread
from gpu_worker.bank.loader import Fetch
from gpu_worker.config import NativeWorkerConfig
from gpu_worker.engine import EngineHealth, InferenceEngine
from gpu_worker.errors import EngineStopped
from gpu_worker.front.delta_stream import EventMail, Events
from gpu_worker.front.engine_status import EngineStatus
from gpu_worker.front.row import Row, Sink
from gpu_worker.native.checks.warm_up import warm_up
from gpu_worker.native.kernels.kernel_loading import num_missing_kernels
from gpu_worker.native.loop import Engine
from gpu_worker.native.openmp import run_on_short_lived_thread, thread_team_releaser
from lora_store.adapter import Shapes

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class NativeEngine(InferenceEngine):
    """The thread that steps a loop. Commands reach it through a queue and run between steps."""

    def __init__(self, loop: Engine, *, stream_interval_ms: float = 25.0, niceness: int = 0) -> None:
        """Start the thread. Build the loop with `run_on_short_lived_thread`.

        `niceness`: nice value of this thread, so that request handling on the same cores has priority. The thread that
        tokenizes comes after it.
        """
        super().__init__(
            loop.prepare,
            dtype=loop.base.dtype,
            max_waiting=loop.config.max_waiting,
            stream_interval_ms=stream_interval_ms,
            niceness=niceness,
            num_missing_kernels=num_missing_kernels(loop.config),
            clock=loop.clock,
        )
        self.loop = loop
        self._niceness = niceness
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # orders the last command before the end of the thread
        self._is_closed = False
        self._stopping = False
        self._busy_since: float | None = None
        self._failure: BaseException | None = None  # the error that ended the thread, if any
        self._mail: EventMail | None = None
        self._end_team = thread_team_releaser()
        loop.on_loaded = lambda: self._commands.put(_no_op)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def start(
        cls,
        config: NativeWorkerConfig,
        fetch: Fetch,
        *,
        executor: Executor | None = None,
        stream_interval_ms: float = 25.0,
        niceness: int = 0,
        free_fill: float = 0.0,
    ) -> NativeEngine:
        """Load the base model, compute the first steps, and start the engine's thread.

        `free_fill`: value of free bank rows, see LoraBank.
        Raises: BaseModelUnsupported, WorkerConfigInvalid, WarmUpFailed.
        """
        use_one_thread()

        def build() -> Engine:
            return warm_up(Engine(config, fetch, executor=executor, free_fill=free_fill))

        loop = run_on_short_lived_thread(build)
        loop.release()
        return cls(loop, stream_interval_ms=stream_interval_ms, niceness=niceness)

    @property
    def module_shapes(self) -> Shapes:
        return self.loop.bank.shapes

    async def forget(self, weights_digests: Collection[str]) -> bool:
        return await self._run_on_engine(lambda: self.loop.queue.forget(weights_digests))

    async def status(self) -> EngineStatus:
        return await self._run_on_engine(self.loop.status)

    async def expected(self) -> frozenset[str]:
        return await self._run_on_engine(self.loop.queue.expected)

    def health(self) -> EngineHealth:
        """Return whether the thread still steps, and how long the step or command in progress has taken."""
        since = self._busy_since
        busy_s = 0.0 if since is None else time.monotonic() - since
        is_alive = self._thread.is_alive() and not self._is_closed
        failure = None if is_alive else f"the engine's thread has ended: {self._failure or 'it was stopped'}"
        return EngineHealth(is_alive, busy_s, failure)

    def kill(self) -> None:
        """Do nothing: the engine is part of this process."""

    def stop(self) -> None:
        self._close_threads()
        self._stopping = True
        self._commands.put(_no_op)
        self._thread.join()

    def _submit(self, rows: Sequence[Row]) -> None:
        self._command(lambda: self._submit_now(rows))

    def _cancel(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._commands.put(partial(self.loop.cancel, row))

    async def _load(self, weights_digests: Collection[str]) -> None:
        loads = await self._run_on_engine(lambda: self.loop.queue.load(weights_digests))
        await asyncio.gather(*[asyncio.wrap_future(load) for load in loads], return_exceptions=True)

    def _put(self, events: Events) -> Sink:
        loop = asyncio.get_running_loop()
        mail = self._mail
        if mail is None or mail.loop is not loop:
            self._mail = mail = EventMail(loop)
        return partial(mail.send, events)

    def _command(self, command: Callable[[], None]) -> None:
        """Queue a command for the engine's thread. Raises: EngineStopped if the thread has ended."""
        with self._lock:
            if self._is_closed:
                raise EngineStopped("the engine has stopped")
            self._commands.put(command)

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

    def _submit_now(self, rows: Sequence[Row]) -> None:
        for row in rows:
            try:
                self.loop.submit(row)
            except Exception as exc:
                self.loop.queue.send(row, exc)

    def _run(self) -> None:
        os.nice(self._niceness)  # Linux: applies to this thread and those it starts
        try:
            self._step_until_stopped()
        except BaseException as exc:  # a panic of a library in Rust is no Exception
            logger.exception("the engine's thread ends because of an error")
            self._failure = exc
        with self._lock:
            self._is_closed = True
        with self._busy():
            self._end_all()

    def _step_until_stopped(self) -> None:
        idle = True
        while not self._stopping:
            self._run_commands(wait=idle)
            with self._busy():
                idle = not self.loop.step()

    def _run_commands(self, *, wait: bool) -> None:
        """Run the queued commands. If idle, sleep until a command (also of a finished load) or a deadline."""
        if wait:
            if self._commands.empty():
                self._end_team()
            try:
                command = self._commands.get(timeout=self.loop.seconds_to_due)
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
        end_requests = partial(self.loop.fail_all, EngineStopped("the engine has stopped"))
        commands: list[Callable[[], None]] = [*self._queued(), end_requests, self.loop.close]
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
        """Count the block in the health's `busy_s`."""
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None


def _no_op() -> None:
    """Do nothing: a command that only wakes up the engine's thread."""
