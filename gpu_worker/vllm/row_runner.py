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
from gpu_worker.config import VllmWorkerConfig
from gpu_worker.errors import EngineStopped, GpuWorkerError, RequestFailed
from gpu_worker.front.engine_status import EngineStatus
from gpu_worker.front.logprobs import Scored
from gpu_worker.front.prefix import Prefix
from gpu_worker.front.queue import RequestQueue
from gpu_worker.front.request.request import Delta
from gpu_worker.front.row import Row
from gpu_worker.vllm.fusions import FusionLoader, list_adapters
from gpu_worker.vllm.remote_bank import PlannedResidency, RemoteBank

logger = logging.getLogger(__name__)

NewToken = tuple[int, Scored | None]
GenerateTokens = Callable[[Row], AsyncGenerator[Sequence[NewToken]]]
"""Yields a row's new tokens, step by step. Closing it ends the row in the workers before it returns."""


class RowPlaces:
    """As many places as vLLM's batch has rows; vLLM's scheduler places keys and values.

    `num_freed`: rows freed since the start.
    """

    def __init__(self, num_places: int) -> None:
        self.num_places, self.num_free, self.num_freed = num_places, num_places, 0

    def is_coming(self, num_tokens: int, prefix: Prefix | None) -> bool:
        return False

    def fits(self, num_tokens: int, prefix: Prefix | None) -> bool:
        return self.num_free > 0

    def allocate(self, num_tokens: int, longest_len: int, prefix: Prefix | None) -> int:
        self.num_free -= 1
        return 0

    def num_reused(self, row: int) -> int:
        return 0  # vLLM says itself how many tokens it found, with the row's first token

    def forget(self, digests: Collection[str]) -> None:
        """Do nothing: vLLM finds blocks by the plan's weights digests, which no other adapter gets."""

    def free(self) -> None:
        self.num_free += 1
        self.num_freed += 1


class RowRunner:
    """The rows of one engine. All methods belong to one event loop.

    `generate` gets a row when all its adapters are in the workers' banks, where they stay until it has closed.
    `kv_tokens`: of the workers' cache, for the status. `expert_bytes`: see PlannedResidency.
    """

    def __init__(
        self,
        config: VllmWorkerConfig,
        generate: GenerateTokens,
        bank: RemoteBank,
        loader: FusionLoader,
        *,
        kv_tokens: int,
        expert_bytes: tuple[int, int] = (0, 0),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._generate, self._bank, self._kv_tokens, self._clock = generate, bank, kv_tokens, clock
        self._loop = asyncio.get_running_loop()
        self._residency = PlannedResidency(bank, config.bank_rank_rows, config.num_fusion_rows, expert_bytes)
        self._places = RowPlaces(config.max_batch_size)
        self._queue = RequestQueue(
            config,
            loader,
            self._residency,
            self._places,
            parts=list_adapters,
            pending_parts=loader.pending_parts,
            clock=clock,
        )
        self._tasks: dict[Row, asyncio.Task[Delta]] = {}
        self._errors: dict[Row, Exception] = {}  # for rows whose task is being cancelled
        self._timer: asyncio.TimerHandle | None = None  # until the next request may be overdue
        self._last_progress = clock()
        self.failure: Exception | None = None

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue the rows. A row that the queue refuses gets its error. Raises: EngineStopped."""
        self._require_running()
        for row in rows:
            try:
                self._queue.submit(row)
            except GpuWorkerError as exc:
                self._queue.send(row, exc)
        self._set_timer()
        self.pump()

    def cancel(self, rows: Sequence[Row]) -> None:
        """Cancel those of the rows that have not ended."""
        for row in rows:
            self._cancel(row)
        self.pump()

    def pump(self) -> None:
        """Start the rows that can start. Call after every change of the queue, the loads or the running rows."""
        if self.failure is not None:
            return
        for row in self._queue.admit():
            self._start(row)
        self._queue.drop_forgotten()

    def forget(self, digests: Collection[str]) -> bool:
        """See `InferenceEngine.forget`. Raises: EngineStopped."""
        self._require_running()
        return self._queue.forget(digests)

    def load(self, digests: Collection[str]) -> list[asyncio.Future[DeviceAdapter]]:
        """Start loading the adapters that no worker holds. Raises: EngineStopped."""
        self._require_running()
        return [asyncio.wrap_future(load) for load in self._queue.load(digests)]

    def status(self) -> EngineStatus:
        """Return the current state. Raises: EngineStopped."""
        self._require_running()
        used_tokens = sum(len(row.tokens) for row in self._queue.running)
        return self._queue.status(kv_tokens=used_tokens, free_kv_tokens=max(self._kv_tokens - used_tokens, 0))

    def expected(self) -> frozenset[str]:
        """See `InferenceEngine.expected`. Raises: EngineStopped."""
        self._require_running()
        return self._queue.expected()

    def seconds_without_progress(self) -> float:
        """Return the time since a running row started or got a token, or the workers answered; 0 if no row runs."""
        return self._clock() - self._last_progress if self._queue.running else 0.0

    async def watch(self, ask: Callable[[], Awaitable[object]], period_s: float) -> None:
        """Ask the workers for an answer from time to time while rows run, until one fails.

        They answer between two steps. A long prompt takes many steps before its first token, but does not hang.
        """
        while self.failure is None:
            await asyncio.sleep(period_s)
            try:
                if self._queue.running:
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
        if self._timer is not None:
            self._timer.cancel()
        self._queue.end_all_waiting(error)
        self._queue.running.clear()
        tasks, self._tasks = self._tasks, {}
        for row, task in tasks.items():
            self._queue.send(row, error)
            task.cancel()

    def _require_running(self) -> None:
        if self.failure is not None:
            raise EngineStopped(f"the engine has stopped: {self.failure}")

    def _set_timer(self) -> None:
        """Wake up when the next request may be overdue."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._queue.next_due != math.inf:
            wait_s = max(self._queue.next_due - self._clock(), 0.0)
            self._timer = self._loop.call_later(wait_s, self._end_overdue)

    def _end_overdue(self) -> None:
        for row, error in self._queue.end_overdue():
            if self._cancel_task(row):
                self._errors[row] = error
        self._set_timer()
        self.pump()

    def _start(self, row: Row) -> None:
        self._last_progress = self._clock()
        task = self._loop.create_task(self._compute(row))
        self._tasks[row] = task
        task.add_done_callback(partial(self._ended, row))

    async def _compute(self, row: Row) -> Delta:
        """Run the row in the workers and return its last delta. Raises: RequestFailed, GrammarFailed, EngineStopped."""
        await self._bank.written(row.adapter_set)
        async with aclosing(self._generate(row)) as steps:
            async for tokens in steps:
                self._last_progress = self._clock()
                last = self._deliver(row, tokens)
                if last is not None:
                    return last
        if row.grammar is None:
            raise RequestFailed(row.request_id)
        row.grammar.fail()  # vLLM's matcher refused a token that its mask allowed
        raise row.failure

    def _deliver(self, row: Row, tokens: Sequence[NewToken]) -> Delta | None:
        """Append the tokens and send their text. Return the last delta; tokens after it are ignored.

        Raises: GrammarFailed if the answer ends before its grammar does.
        """
        counters = self._queue.counters
        for token, scored in tokens:
            if row.num_new_tokens == 0 and not row.capture_first_logits:  # probes are not traffic
                counters.num_prompt_tokens += row.num_prompt_tokens
                counters.num_cached_tokens += row.num_cached_tokens
            delta = row.append_token(token, scored)
            counters.num_new_tokens += not row.capture_first_logits
            if row.grammar is not None and token in row.end_ids:
                row.grammar.check_end()
                if row.grammar.error is not None:
                    raise row.failure
            if delta is not None and delta.finish_reason is not None:
                return delta
            if delta is not None and not self._queue.send(row, delta):
                self._cancel(row)
        return None

    def _cancel(self, row: Row) -> None:
        """Take the row out of the queue or the batch. Its client has left."""
        if row in self._tasks:
            self._cancel_task(row)
        elif row in self._queue.waiting:
            self._queue.remove(row)

    def _cancel_task(self, row: Row) -> bool:
        """Cancel the row's task, once: a second time would interrupt the closing of `generate`."""
        task = self._tasks[row]
        return not task.cancelling() and task.cancel()

    def _ended(self, row: Row, task: asyncio.Task[Delta]) -> None:
        """Release what a row had, after its task has closed `generate`."""
        event = self._errors.pop(row, None) or _outcome(row, task)
        if self._tasks.pop(row, None) is None:
            return  # `stop` has ended the row
        self._queue.end_running(row)
        self._places.free()
        self._residency.unpin(row.weights_digests)
        self._residency.settle()
        row.is_pinned = False
        if event is not None:
            self._queue.send(row, event)
        self.pump()


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
