"""Queue rows, bring their adapters to the workers, and run each row in a task of its own."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing
from functools import partial

from gpu_worker.bank.device_layout import DeviceAdapter
from gpu_worker.config import WorkerConfig
from gpu_worker.errors import (
    DeadlineExceeded,
    EngineStopped,
    GpuWorkerError,
    RequestFailed,
    WaitedTooLong,
)
from gpu_worker.front.admission import Admission
from gpu_worker.front.counters import Counters
from gpu_worker.front.engine_status import EngineStatus
from gpu_worker.front.logprobs import Scored
from gpu_worker.front.prefetch_window import PrefetchWindow
from gpu_worker.front.request.request import Delta
from gpu_worker.front.row import Row
from gpu_worker.vllm.fusions import FusionLoader, adapters_of
from gpu_worker.vllm.remote_bank import PlannedResidency, RemoteBank
from gpu_worker.vllm.row_places import RowPlaces

logger = logging.getLogger(__name__)

NewToken = tuple[int, Scored | None]
GenerateTokens = Callable[[Row], AsyncGenerator[Sequence[NewToken]]]
"""Yields a row's new tokens, step by step. Closing it ends the row in the workers before it returns."""

_WINDOW_BATCHES = 2  # batches of rows whose weights are prefetched


class RowRunner:
    """The rows of one engine. All methods belong to one event loop.

    `generate` gets a row when all its adapters are in the workers' banks, where they stay until it has closed.
    `kv_tokens`: of the workers' cache, for the status.
    """

    def __init__(
        self,
        config: WorkerConfig,
        generate: GenerateTokens,
        bank: RemoteBank,
        loader: FusionLoader,
        *,
        kv_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._generate, self._bank, self._loader = config, generate, bank, loader
        self._kv_tokens, self._clock = kv_tokens, clock
        self._loop = asyncio.get_running_loop()
        self._residency = PlannedResidency(bank, config.bank_rank_rows, config.num_fusion_rows)
        self._places = RowPlaces(config.max_batch_size)
        window = PrefetchWindow(config.host_cache_bytes, _WINDOW_BATCHES * config.max_batch_size, loader.pending_parts)
        self._admission = Admission(loader, self._residency, self._places, window)
        self._running: dict[Row, asyncio.Task[Delta]] = {}
        self._errors: dict[Row, Exception] = {}  # of rows whose task is being cancelled
        self._timers: dict[Row, list[asyncio.TimerHandle]] = {}
        self._forgetting: set[str] = set()
        self._counters = Counters()
        self._last_progress = clock()
        self.failure: Exception | None = None

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue the rows. A row that the queue refuses gets its error. Raises: EngineStopped."""
        self._require_running()
        for row in rows:
            try:
                self._queue(row)
            except GpuWorkerError as exc:
                self._send(row, exc)
        self.pump()

    def cancel(self, rows: Sequence[Row]) -> None:
        """Cancel those of the rows that have not ended."""
        for row in rows:
            self._end(row, None)
        self.pump()

    def pump(self) -> None:
        """Start the rows that can start. Call after every change of the queue, the loads or the running rows."""
        if self.failure is not None:
            return
        started, failed = self._admission.admit()
        self._residency.settle()
        for row, error in failed:
            self._finish(row, error)
        for row in started:
            self._start(row)
        self._drop_forgotten()

    def forget(self, digests: Collection[str]) -> bool:
        """See `InferenceEngine.forget`. Raises: EngineStopped."""
        self._require_running()
        self._forgetting.update(digests)
        self._drop_forgotten()
        return self._forgetting.isdisjoint(digests)

    def load(self, digests: Collection[str]) -> list[asyncio.Future[DeviceAdapter]]:
        """Start loading the adapters that no worker holds. Raises: EngineStopped."""
        self._require_running()
        missing = [digest for digest in digests if digest not in self._residency]
        return [asyncio.wrap_future(self._loader.load(digest)) for digest in missing]

    def status(self) -> EngineStatus:
        """Return the current state. Raises: EngineStopped."""
        self._require_running()
        waiting = self._admission.waiting
        used_tokens = sum(len(row.tokens) for row in self._running)
        return EngineStatus(
            resident=self._residency.resident,
            occupied_rows=self._residency.occupied_rows,
            active_rows=self._residency.active_rows,
            num_running=len(self._running),
            num_waiting=len(waiting),
            waiting_tokens=sum(row.expected_len for row in waiting),
            free_kv_rows=self._places.num_free,
            free_kv_tokens=max(self._kv_tokens - used_tokens, 0),
            kv_tokens=used_tokens,
            host_cache_bytes=self._loader.cached_bytes,
            num_forgetting=len(self._forgetting),
            counters=self._counters.copy(),
        )

    def expected(self) -> frozenset[str]:
        """See `InferenceEngine.expected`. Raises: EngineStopped."""
        self._require_running()
        waiting = [digest for row in self._admission.waiting for digest in row.weights_digests]
        return self._residency.resident.union(adapters_of(waiting))

    def seconds_without_progress(self) -> float:
        """Return the time since a running row started or got a token, or the workers answered; 0 if no row runs."""
        return self._clock() - self._last_progress if self._running else 0.0

    async def watch(self, ask: Callable[[], Awaitable[object]], period_s: float) -> None:
        """Ask the workers for an answer from time to time while rows run, until one fails.

        They answer between two steps. A long prompt takes many steps before its first token, but does not hang.
        """
        while self.failure is None:
            await asyncio.sleep(period_s)
            try:
                if self._running:
                    await ask()
                    self._last_progress = self._clock()
            except Exception as exc:
                self.stop(exc)

    def stop(self, failure: Exception) -> None:
        """End every row with EngineStopped, and refuse all later calls. `failure`: the reason."""
        if self.failure is not None:
            return
        self.failure = failure
        error = EngineStopped(f"the engine has stopped: {failure}")
        error.__cause__ = failure
        for row in self._admission.clear():
            self._finish(row, error)
        running, self._running = self._running, {}
        for row, task in running.items():
            self._finish(row, error)
            task.cancel()

    def _require_running(self) -> None:
        if self.failure is not None:
            raise EngineStopped(f"the engine has stopped: {self.failure}")

    def _queue(self, row: Row) -> None:
        if (displaced := self._admission.waiting.displaced_by(row.tenant, self._config.max_waiting)) is not None:
            self._end(*displaced)
        if not row.capture_first_logits:  # probes are not traffic
            self._count(row)
        now = row.arrived_at = self._clock()
        row.start_by = now + self._config.max_wait_s
        self._admission.append(row)
        due = [at for at in (row.deadline, row.start_by) if at != math.inf]
        self._timers[row] = [self._loop.call_later(max(at - now, 0), self._expire, row) for at in due]

    def _count(self, row: Row) -> None:
        """Count the request. The adapters of a fusion that the workers hold are in the bank."""
        digests = row.weights_digests
        in_bank = set(adapters_of(digest for digest in digests if digest in self._residency))
        self._counters.count_request([*adapters_of(digests)], in_bank, self._loader)

    def _expire(self, row: Row) -> None:
        """End the row if its deadline has passed, or if it has waited too long to start."""
        now = self._clock()
        if row.deadline <= now:
            self._end(row, DeadlineExceeded(row.num_new_tokens))
        elif row.start_by <= now and row in self._admission.waiting:
            self._end(row, WaitedTooLong(self._config.max_wait_s))
        self.pump()

    def _start(self, row: Row) -> None:
        self._last_progress = self._clock()
        row.queued_s = self._last_progress - row.arrived_at
        task = self._loop.create_task(self._compute(row))
        self._running[row] = task
        task.add_done_callback(partial(self._ended, row))

    async def _compute(self, row: Row) -> Delta:
        """Run the row in the workers and return its last delta. Raises: RequestFailed, EngineStopped."""
        await self._bank.written(row.adapter_set)
        async with aclosing(self._generate(row)) as steps:
            async for tokens in steps:
                self._last_progress = self._clock()
                last = self._deliver(row, tokens)
                if last is not None:
                    return last
        raise RequestFailed(row.request_id)

    def _deliver(self, row: Row, tokens: Sequence[NewToken]) -> Delta | None:
        """Append the tokens and send their text. Return the last delta; tokens after it are ignored."""
        for token, scored in tokens:
            if row.num_new_tokens == 0:
                self._counters.num_prompt_tokens += row.num_prompt_tokens
                self._counters.num_cached_tokens += row.num_cached_tokens
            delta = row.append_token(token, scored)
            self._counters.num_new_tokens += 1
            if delta is not None and delta.finish_reason is not None:
                return delta
            if delta is not None:
                self._send(row, delta)
        return None

    def _end(self, row: Row, error: Exception | None) -> None:
        """Take the row out of the queue or the batch. `error`: for its client; None: the client has left."""
        if row in self._running:
            if error is not None:
                self._errors[row] = error
            self._running[row].cancel()
        elif row in self._admission.waiting:
            self._admission.remove(row)
            self._finish(row, error)

    def _ended(self, row: Row, task: asyncio.Task[Delta]) -> None:
        """Release what a row had, after its task has closed `generate`."""
        event = self._errors.pop(row, None) or _outcome(row, task)
        if self._running.pop(row, None) is None:
            return  # `stop` has ended the row
        self._places.free()
        self._residency.unpin(row.weights_digests)
        row.is_pinned = False
        self._finish(row, event)
        self.pump()

    def _finish(self, row: Row, event: Delta | Exception | None) -> None:
        for timer in self._timers.pop(row, []):
            timer.cancel()
        if event is not None:
            self._send(row, event)

    def _send(self, row: Row, event: Delta | Exception) -> None:
        try:
            row.sink(event)
        except Exception:
            logger.warning("the client of request %s is gone", row.request_id, exc_info=True)
            self._end(row, None)

    def _drop_forgotten(self) -> None:
        """Drop the weights to forget that are no longer used or being loaded."""
        if not self._forgetting:
            return
        of_rows = [digest for row in (*self._running, *self._admission.waiting) for digest in row.weights_digests]
        unused = self._forgetting.difference(adapters_of([*of_rows, *self._loader.loading]))
        for digest in unused:
            self._loader.discard(digest)
        self._residency.drop(unused)
        self._forgetting -= unused


def _outcome(row: Row, task: asyncio.Task[Delta]) -> Delta | Exception | None:
    """Return the last event of an ended task, None if it was cancelled."""
    if task.cancelled():
        return None
    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, GpuWorkerError):
        return error
    logger.error("request %s failed", row.request_id, exc_info=error)
    failed = RequestFailed(row.request_id)
    failed.__cause__ = error
    return failed
