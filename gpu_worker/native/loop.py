"""The generation loop: admit requests, compute one packed step, sample, deliver text."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial

import torch
from torch import Tensor

from gpu_worker.bank.device_memory import release_unused
from gpu_worker.bank.load_threads import load_executor
from gpu_worker.bank.loader import AdapterLoader, Fetch
from gpu_worker.bank.residency import Residency
from gpu_worker.config import NativeWorkerConfig
from gpu_worker.errors import EngineStopped, GrammarFailed, RequestFailed
from gpu_worker.front.engine_status import Counters, EngineStatus
from gpu_worker.front.fair_queue import FairQueue
from gpu_worker.front.logprobs import Scored
from gpu_worker.front.prefix import Prefix, make_namespace
from gpu_worker.front.preprocess import RequestPreprocessor, grammar_compiler
from gpu_worker.front.queue import RequestQueue
from gpu_worker.front.request.request import Delta
from gpu_worker.front.row import Row
from gpu_worker.model.base_model import BaseModel
from gpu_worker.model.experts import adapt_experts, expert_shapes
from gpu_worker.model.inject import Adaptable
from gpu_worker.model.routers import adapt_routers
from gpu_worker.model.step_context import StepContext
from gpu_worker.native import device_parts
from gpu_worker.native.attention.kv_cache import KvCache, KvShape
from gpu_worker.native.checks.device_check import NOTHING_COMPUTED, DeviceCheck
from gpu_worker.native.checks.isolation import compute_isolated
from gpu_worker.native.checks.model_check import ModelCheck
from gpu_worker.native.checks.passed_check import PassedCheck
from gpu_worker.native.forward import ForwardPass
from gpu_worker.native.fused import Choices
from gpu_worker.native.memory_plan import load_planned
from gpu_worker.native.next_tokens import Chosen, choose, find_grammars, find_masks
from gpu_worker.native.prompt_lookup import guess_all, settle, take
from gpu_worker.native.sampling.mask_thread import MaskThread
from gpu_worker.native.sampling.sampling import Sampler
from gpu_worker.native.sampling.sampling_kernel import SamplingKernel
from gpu_worker.native.scheduler import Scheduled, schedule
from gpu_worker.native.thread_count import thread_count

logger = logging.getLogger(__name__)

_LONGEST_SLEEP_S = 3600.0  # locks do not accept arbitrarily long timeouts


class Engine:
    """One base model and its bank, driven by one thread.

    `prepare` may be called from any thread, all other methods only from the thread that steps.
    """

    def __init__(
        self,
        config: NativeWorkerConfig,
        fetch: Fetch,
        *,
        base: BaseModel | None = None,
        executor: Executor | None = None,
        free_fill: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        build_kv_cache: Callable[[KvShape], KvCache] | None = None,
    ) -> None:
        self._threads = thread_count(config.num_threads, shares_cores=config.shares_cores and config.device == "cpu")
        self.config, self.clock = config, clock
        passed = PassedCheck(config) if base is None else None
        self.base, self.memory = load_planned(config, base, None if passed is None else passed.source)
        self.max_len = self.memory.kv.max_len
        context = StepContext()
        found = Adaptable.of(self.base.model)
        choices = Choices(None if passed is None else passed.read())
        check = None if choices.are_known else ModelCheck(self.base, found, self.max_len, config.bank_rank_rows)
        device_parts.fuse_where_compiled(self.base.model, config, choices)
        self.bank = device_parts.make_bank(config, found.linears, free_fill, expert_shapes(found.experts))
        found.linears.clear()  # so that the memory of a layer is free once it is packed
        device_parts.inject_adapters(self.base.model, self.bank, context, config, choices)
        adapt_experts(found.experts, context)
        adapt_routers(found.routers, self.bank.modules, context)
        self._masks = MaskThread()
        self._sampler = Sampler(SamplingKernel.load(config.cache_dir) if config.device == "cpu" else None)
        kernel, device = device_parts.make_lora_kernel(config), torch.device(config.device)
        self.residency = Residency(  # the kernel reads rows anywhere
            self.bank, is_packed=kernel is None, expert_bytes=self.memory.expert_bytes
        )
        self.kv_cache = (build_kv_cache or partial(device_parts.make_kv_cache, config))(self.memory.kv)
        self._forward = ForwardPass(self.base, self.residency, self.kv_cache, context, kernel, device)
        if check is None:
            logger.info("%s agreed with transformers at an earlier start and is not compared again", config.base_model)
        else:
            check.run(self._forward, self.residency, self.kv_cache)
            if passed is not None:
                passed.note(choices.made)
        self.grammars = grammar_compiler(self.base, config.tool_parser)
        self.prepare = RequestPreprocessor.of(config, self.base, self.max_len, self.grammars, clock)
        state = self.bank, self.residency, self.kv_cache
        self._device_check = DeviceCheck(self._forward, self._attempt, self.prepare, *state)
        self._executor = executor or load_executor(config.load_threads)
        self.loaded = threading.Event()
        self.on_loaded: Callable[[], None] = self.loaded.set
        self.loader = AdapterLoader(
            fetch,
            to_device_layout=self.bank.to_device_layout,
            executor=self._executor,
            budget_bytes=config.host_cache_bytes,
            on_done=lambda: self.on_loaded(),
        )
        self.queue = RequestQueue(config, self.loader, self.residency, self.kv_cache, clock=clock)
        self.running = self.queue.running

    def submit(self, row: Row) -> None:
        """Queue the row, with its keys in the prefix cache. Raises: EngineFull."""
        if self.config.prefix_cache and not row.skips_prefix_cache:
            namespace = make_namespace(row.plan, row.tenant, shares_base=self.config.prefix_cache_shares_base)
            row.prefix = Prefix(row.tokens, namespace, row.adapter_set, self.kv_cache.shape.page_tokens)
        self.queue.submit(row)

    def cancel(self, row: Row) -> None:
        """Cancel the request, running or waiting. Its KV, pins and queue place are free for the next step."""
        if row in self.running:
            self._release([row])
        elif row in self.waiting:
            self.queue.remove(row)
        self.queue.drop_forgotten()

    def status(self) -> EngineStatus:
        """Return the current state."""
        return self.queue.status(
            kv_tokens=sum(row.num_computed for row in self.running),
            free_kv_tokens=self.kv_cache.num_free_tokens,
            prefix_cache_tokens=self.kv_cache.num_cached_tokens,
            num_threads=self._threads.count,
        )

    def release(self) -> None:
        """Give Linux the memory that an engine without rows and adapters does not need until it has some."""
        self.bank.release()
        self.kv_cache.release()
        release_unused()

    def fail_all(self, error: Exception) -> None:
        """End every request with `error`. Raises: errors of freeing on a lost device, after sending all events."""
        try:
            self._end([(row, error) for row in self.running])
        finally:
            self.queue.end_all_waiting(error)
        self.queue.drop_forgotten()

    def close(self) -> None:
        """Start no more loads and compilations."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._masks.close()
        self.grammars.close()

    @property
    def waiting(self) -> FairQueue[Row]:
        return self.queue.waiting

    @property
    def counters(self) -> Counters:
        return self.queue.counters

    @property
    def num_steps(self) -> int:
        return self.counters.num_steps

    @property
    def seconds_to_due(self) -> float | None:
        """Return the seconds until a request may be overdue, at most an hour; None if no request has a deadline."""
        due = self.queue.next_due
        return None if due == math.inf else min(max(due - self.clock(), 0.0), _LONGEST_SLEEP_S)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @torch.inference_mode()
    def step(self, *, max_tokens: int | None = None) -> bool:
        """Admit requests, compute one packed step and sample. Return whether a row ran; otherwise all wait for loads.

        `max_tokens`: limit of this step, if lower than `max_step_tokens`.
        Raises: EngineStopped if the device is broken.
        """
        self._end(self.queue.end_overdue())
        self._grow()
        self.queue.admit()
        has_run = bool(self.running)
        if has_run:
            self._threads.update(computes=True)
            began = time.perf_counter()
            self._compute(max_tokens or self.config.max_step_tokens)
            self.counters.num_steps += 1
            self.counters.step_s += time.perf_counter() - began
            self.counters.num_evicted_blocks = self.kv_cache.num_evicted
            self._threads.update(computes=bool(self.running))
        self.queue.drop_forgotten()
        return has_run

    def run_until_idle(self) -> None:
        """Step until every request has ended. For measurements and tests, without a thread."""
        while self.has_work:
            self.loaded.clear()
            if not self.step() and self.waiting:
                self.loaded.wait(self.seconds_to_due)

    def _grow(self) -> None:
        """Give every running row KV for its tokens. If there is not enough, preempt the rows that joined last.

        The row that joined first is never preempted, because one row always fits. So every row ends eventually.
        """
        index = 0
        while index < len(self.running):
            row = self.running[index]
            if self.kv_cache.grow(row.kv_row, len(row.tokens)):
                index += 1
            else:
                self._preempt(self.running.pop())

    def _preempt(self, row: Row) -> None:
        """Free the row's KV and requeue it. It keeps its tokens and recomputes them as one prompt."""
        kv_row, row.kv_row = row.kv_row, -1
        self.queue.requeue(row)
        self.kv_cache.free(kv_row)

    def _compute(self, max_tokens: int) -> None:
        """Compute the scheduled tokens, isolating rows that fail, and deliver the new tokens.

        Raises: EngineStopped after three consecutive steps that fail because of the device.
        """
        guess_all(self.running, self.config.prompt_lookup_tokens, max_tokens, self.kv_cache)
        scheduled = schedule(self.running, max_tokens, self.config.chunk_tokens)
        outcome = compute_isolated(scheduled, self._attempt)
        for part, chosen in outcome.computed:
            self._deliver(part, chosen)
        if outcome.computed:
            self._device_check.reset()
        if outcome.failed:
            num_tokens = max(segment.num_tokens for _, segment in scheduled)
            self._end_failed(outcome.failed, num_tokens, works=bool(outcome.computed))

    def _attempt(self, part: Sequence[Scheduled]) -> Chosen:
        self._masks.begin(find_grammars(part))
        logits = self._forward(part, partial(find_masks, part, self._masks.finish))
        self._masks.finish()
        return choose(part, logits, self._sampler)

    def _deliver(self, part: Sequence[Scheduled], chosen: Chosen) -> None:
        """Append the new token of each computed row, and send its text to the client."""
        for row, segment in part:
            if not row.guess:
                row.num_computed += segment.num_tokens
                self.kv_cache.computed(row.kv_row, row.num_computed)
        for row, scores in chosen.prompts:
            row.add_prompt_scores(scores)
        rows = dict.fromkeys(chosen.rows)  # one with guesses is there several times
        begun = [row for row in rows if row.num_new_tokens == 0 and not row.capture_first_logits]
        self.counters.num_prompt_tokens += sum(row.num_prompt_tokens for row in begun)
        made = []
        for row, choices in chosen.by_row():
            event, num_taken = take(row.guess, choices, partial(self._append_token, row))
            self.counters.num_new_tokens += num_taken * (row.max_new_tokens > 0 and not row.capture_first_logits)
            if row.guess:
                settle(row, num_taken, self.kv_cache)
            made.append((row, event))
        self._end([(row, event) for row, event in made if event is not None and _is_last(event)])
        texts = [(row, event) for row, event in made if event is not None and not _is_last(event)]
        self._release([row for row, event in texts if not self.queue.send(row, event)])

    def _end_failed(self, failed: Sequence[tuple[Row, Exception]], num_tokens: int, *, works: bool) -> None:
        """End the rows that could not be computed. `works`: other rows were computed; otherwise check the device.

        If the device works, the rows are to blame and must not be retried. Otherwise other replicas may answer them.
        num_tokens: tokens of the step's longest segment. Raises: EngineStopped.
        """
        try:
            for row, _ in failed:
                self.kv_cache.distrust(row.kv_row)
            self._release([row for row, _ in failed])
            works = works or self._device_check.works(num_tokens)
        finally:  # freeing may raise on a lost device; clients must still get their error
            for row, cause in failed:
                error = RequestFailed(row.request_id) if works else EngineStopped(NOTHING_COMPUTED)
                error.__cause__ = cause
                self.queue.send(row, error)
        self._device_check.require()

    def _append_token(
        self, row: Row, token: int | None, scored: Scored | None, logits: Tensor | None
    ) -> Delta | Exception | None:
        """Append the token to the row and return the event for its client."""
        if token is None or row.has_unsound_prompt:
            failure = row.failure
            if row.has_unsound_prompt or not isinstance(failure, GrammarFailed):
                self.kv_cache.distrust(row.kv_row)  # its keys and values may not be finite
            return failure
        if row.captures_next_logits and logits is not None:
            row.first_logits = logits.to("cpu", torch.float32, copy=True)
        try:
            return row.append_token(token, scored)
        except BaseException:  # a panic of the library is no Exception
            logger.exception("cannot decode token %d of request %s", token, row.request_id)
            return RequestFailed(row.request_id)

    def _end(self, ended: Sequence[tuple[Row, Delta | Exception]]) -> None:
        """Free the resources of these running rows, then send their last events, even if freeing raises."""
        try:
            self._release([row for row, _ in ended])
        finally:
            for row, event in ended:
                self.queue.send(row, event)

    def _release(self, rows: Sequence[Row]) -> None:
        """Remove these rows from the batch and free their KV and pins, also after a failed step.

        Raises: errors of zeroing memory on a lost device. The rows have left the batch even then.
        """
        if not rows:
            return
        for row in rows:
            self.queue.end_running(row)
        for row in rows:
            self.kv_cache.free(row.kv_row)
            row.is_pinned = False
        self.residency.unpin([digest for row in rows for digest in row.weights_digests])
        self.residency.settle()


def _is_last(event: Delta | Exception) -> bool:
    return isinstance(event, Exception) or event.finish_reason is not None
