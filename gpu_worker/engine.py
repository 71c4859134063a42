"""The generation loop: admit, compute one packed step, sample, hand out text."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import torch
from torch import Tensor

from gpu_worker.attention_plan import Segment, attention_plan
from gpu_worker.base_model import BaseModel, load_base_model
from gpu_worker.config import WorkerConfig
from gpu_worker.counters import Counters
from gpu_worker.errors import EngineFull, EngineStopped, LogitsNotFinite
from gpu_worker.fitting import FittedAdapter
from gpu_worker.holdings import Holdings
from gpu_worker.inject import inject, target_linears
from gpu_worker.kv_cache import KvCache
from gpu_worker.loader import AdapterLoader, Fetch
from gpu_worker.bank import LoraBank
from gpu_worker.mapping import StepContext, token_mapping
from gpu_worker.prepare import Preparer
from gpu_worker.request import Delta
from gpu_worker.residency import Residency
from gpu_worker.row import Row
from gpu_worker.sampling import sample
from gpu_worker.scheduler import schedule

logger = logging.getLogger(__name__)

_MAX_PASSES = 50


class Engine:
    """One base model and its bank, stepped by one thread.

    `prepare` may be called from any thread; everything else only from the one that steps.
    """

    def __init__(
        self,
        config: WorkerConfig,
        fetch: Fetch,
        *,
        base: BaseModel | None = None,
        executor: Executor | None = None,
        free_fill: float = 0.0,
    ) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self.base = base or load_base_model(config)
        self.max_len = min(config.max_model_len, self.base.max_position)
        self._step_context = StepContext()
        linears = target_linears(self.base.model, self.base.model.get_output_embeddings())
        self.bank = LoraBank(linears, config.bank_rank_rows, free_fill=free_fill)
        inject(self.base.model, self.bank, self._step_context)
        self.residency = Residency(self.bank)
        self.kv_cache = _kv_cache(self.base, config.max_batch_size, self.max_len)
        self._log_memory()
        self.prepare = Preparer(self.base, self.max_len)
        self._executor = executor or ThreadPoolExecutor(config.load_threads, thread_name_prefix="adapter-load")
        self.loaded = threading.Event()
        self.on_loaded: Callable[[], None] = self.loaded.set
        self.loader = AdapterLoader(
            fetch,
            fit=self.bank.fit,
            executor=self._executor,
            budget_bytes=config.host_cache_bytes,
            on_done=lambda: self.on_loaded(),
        )
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self._forgetting: set[str] = set()
        self.num_steps = 0
        self.counters = Counters()

    def submit(self, row: Row) -> None:
        """Queue the row; adapters that are not in the bank start loading now. Raises: EngineFull."""
        if len(self.waiting) >= self.config.max_waiting:
            raise EngineFull(f"{len(self.waiting)} requests already wait")
        if not row.keep_logits:  # a probe is nobody's traffic
            self.counters.count_request(row.weights_digests, self.residency, self.loader)
        self._load_missing(row)
        self.waiting.append(row)

    def preload(self, digests: Collection[str]) -> list[Future[FittedAdapter]]:
        """The loads of what the bank lacks, begun now."""
        return [self.loader.load(digest) for digest in digests if digest not in self.residency]

    def cancel(self, row: Row) -> None:
        """Drop the request, wherever it is; its KV row, pins and queue place are free for the next step."""
        if row in self.running:
            self._release([row])
        elif row in self.waiting:
            self.waiting.remove(row)
        self._drop_forgotten()

    def forget(self, digests: Collection[str]) -> bool:
        """Whether nothing is left of these weights, in the bank or in host memory.

        What a request uses or loads goes when the last such request or load ends, one that came after this call
        included. Asked for again once they are gone, the weights are fetched again.
        """
        self._forgetting.update(digests)
        self._drop_forgotten()
        return self._forgetting.isdisjoint(digests)

    def holdings(self) -> Holdings:
        return Holdings(
            resident=self.residency.resident,
            occupied_rows=self.residency.occupied_rows,
            active_rows=self.residency.active_rows,
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            free_kv_rows=self.kv_cache.num_free,
            host_cache_bytes=self.loader.cached_bytes,
            num_forgetting=len(self._forgetting),
            counters=self.counters.copy(),
        )

    def fail_all(self, error: Exception) -> None:
        """End every request with `error`."""
        self._fail_running(error)
        while self.waiting:
            self.send(self.waiting.popleft(), error)
        self._drop_forgotten()

    def close(self) -> None:
        """Start no more loads."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @torch.inference_mode()
    def step(self) -> bool:
        """Admit what can run, compute one packed step, sample. False when nothing could run: all wait for loads."""
        self._admit()
        has_run = bool(self.running)
        if has_run:
            self._compute()
        self._drop_forgotten()
        return has_run

    def run_until_idle(self) -> None:
        """Step until every request has ended: how code without a thread of its own drives the engine."""
        while self.has_work:
            self.loaded.clear()
            if not self.step() and self.waiting:
                self.loaded.wait()

    def _log_memory(self) -> None:
        logger.info(
            "%s: %d rows of %d tokens take %d MiB of KV, %d adapter rank rows %d MiB",
            self.config.base_model,
            self.config.max_batch_size,
            self.max_len,
            self.kv_cache.num_bytes >> 20,
            self.config.bank_rank_rows,
            self.bank.num_bytes >> 20,
        )

    def _admit(self) -> None:
        """Move rows whose weights are loaded and fit the bank to the batch; the others wait without blocking them.

        A row passed over `_MAX_PASSES` times reserves the bank: nobody behind it gets adapters until it runs.
        """
        queue, self.waiting = self.waiting, deque()
        num_running, reserved = len(self.running), False
        for row in queue:
            if self.kv_cache.num_free == 0 or (reserved and row.plan.adapters):
                self.waiting.append(row)
            elif not self._try_start(row):
                self.waiting.append(row)
                reserved = reserved or (row.num_passes > _MAX_PASSES and not self._is_loading(row))
        if len(self.running) > num_running:
            self.residency.settle()

    def _is_loading(self, row: Row) -> bool:
        """Whether it is a load that the row waits for, which nobody behind it could speed up by waiting too."""
        return any(not load.done() for digest, load in row.loads.items() if digest not in self.residency)

    def _try_start(self, row: Row) -> bool:
        """True when the row runs or has failed, False when it must wait."""
        self._load_missing(row)
        missing = {digest: load for digest, load in row.loads.items() if digest not in self.residency}
        if not all(load.done() for load in missing.values()):
            return False
        try:
            loaded = {digest: load.result() for digest, load in missing.items()}
            if not self.residency.try_pin(row.weights_digests, loaded):
                row.num_passes += 1
                return False
        except Exception as exc:  # of its loads or its plan: nobody else's
            self.send(row, exc)
            return True
        row.loads.clear()  # the bank holds them now
        row.kv_row = self.kv_cache.allocate()
        self.running.append(row)
        return True

    def _load_missing(self, row: Row) -> None:
        """Load what the bank lacks: all of it as the row comes, and what was evicted while the row waited."""
        for digest in row.weights_digests:
            if digest not in self.residency and digest not in row.loads:
                row.loads[digest] = self.loader.load(digest)

    def _compute(self) -> None:
        """One forward pass over what is scheduled, and its tokens handed out."""
        scheduled = schedule(self.running, self.config.max_step_tokens)
        ready = [row for row, segment in scheduled if segment.total_len == len(row.tokens)]
        try:
            logits = self._forward(scheduled)
            tokens = sample(logits, [row.draw() for row in ready])
        except Exception as exc:
            logger.exception("a step of %d rows failed", len(scheduled))
            self._fail_running(EngineStopped(f"the step failed: {exc}"))
            return
        for row, segment in scheduled:
            row.num_computed += segment.num_tokens
        self.counters.num_new_tokens += len(ready)
        self.counters.num_prompt_tokens += sum(row.num_prompt_tokens for row in ready if row.num_new_tokens == 0)
        taken = zip(ready, tokens, logits, strict=True)
        made = [(row, self._take(row, token, row_logits)) for row, token, row_logits in taken]
        told = [(row, event) for row, event in made if event is not None]
        self._release([row for row, event in told if _is_last(event)])  # free by the time their clients hear of it
        self._release([row for row, event in told if not self.send(row, event) and not _is_last(event)])
        self.num_steps += 1

    def _forward(self, scheduled: Sequence[tuple[Row, Segment]]) -> Tensor:
        """Logits (rows whose last token was computed, V), float32 or the model's dtype."""
        segments = [segment for _, segment in scheduled]
        mapping = token_mapping(
            [row.plan for row, _ in scheduled], [s.num_tokens for s in segments], self.residency, self.base.dtype
        )
        attention = attention_plan(self.kv_cache, segments)
        self._step_context.fill(mapping, attention)
        ids = [row.tokens[s.context_len : s.total_len] for row, s in scheduled]
        last = [s.end - 1 for row, s in scheduled if s.total_len == len(row.tokens)]
        output = self.base.model(
            input_ids=torch.tensor([token for chunk in ids for token in chunk])[None],
            position_ids=attention.token_positions[None],
            logits_to_keep=torch.tensor(last, dtype=torch.long),
            use_cache=False,
            step=self._step_context,
        )
        logits: Tensor = output.logits[0]
        return logits

    def _take(self, row: Row, token: int | None, logits: Tensor) -> Delta | Exception | None:
        """Hand the row its token; what its client is to be told."""
        if token is None:
            return LogitsNotFinite(f"the plan of request {row.request_id} drives the logits out of range")
        if row.keep_logits and row.first_logits is None:
            row.first_logits = logits.float().clone()
        try:
            return row.take(token)
        except Exception as exc:
            logger.exception("the text of request %s broke", row.request_id)
            return EngineStopped(f"token {token} could not be decoded: {exc}")

    def send(self, row: Row, event: Delta | Exception) -> bool:
        """Whether the request's client took the event; one that is gone costs nobody else."""
        try:
            row.sink(event)
        except Exception:
            logger.warning("the client of request %s is gone", row.request_id, exc_info=True)
            return False
        return True

    def _fail_running(self, error: Exception) -> None:
        failed = self.running[:]
        self._release(failed)
        for row in failed:
            self.send(row, error)

    def _release(self, rows: Sequence[Row]) -> None:
        """All that these rows hold is free; the KV of a step that failed half-way is wiped too."""
        if not rows:
            return
        for row in rows:
            self.running.remove(row)
            self.kv_cache.free(row.kv_row, len(row.tokens))
        self.residency.unpin([digest for row in rows for digest in row.weights_digests])
        self.residency.settle()

    def _drop_forgotten(self) -> None:
        """Free the weights that are to be forgotten and that nobody uses or loads any more."""
        if not self._forgetting:
            return
        used = {digest for row in (*self.running, *self.waiting) for digest in row.weights_digests}
        used |= self.loader.loading
        for digest in self._forgetting - used:
            self.loader.discard(digest)
            if digest in self.residency:
                self.residency.evict(digest)
        self._forgetting &= used


def _is_last(event: Delta | Exception) -> bool:
    return isinstance(event, Exception) or event.finish_reason is not None


def _kv_cache(base: BaseModel, num_rows: int, max_len: int) -> KvCache:
    return KvCache(
        num_layers=base.num_layers,
        num_rows=num_rows,
        num_heads=base.num_kv_heads,
        max_len=max_len,
        head_dim=base.head_dim,
        dtype=base.dtype,
    )
