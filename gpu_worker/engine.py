"""The generation loop: admit, compute one packed step, sample, hand out text."""

from __future__ import annotations

import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import torch
from torch import Tensor

from gpu_worker.attention_plan import Segment, attention_plan
from gpu_worker.base_model import BaseModel, load_base_model
from gpu_worker.config import WorkerConfig
from gpu_worker.errors import EngineFull, EngineStopped, LogitsNotFinite, PlanTooLarge, PromptInvalid, PromptTooLong
from gpu_worker.inject import inject, target_linears
from gpu_worker.kv_cache import KvCache
from gpu_worker.loader import AdapterLoader, Fetch
from gpu_worker.lora_linear import LoraBank
from gpu_worker.mapping import StepContext, token_mapping
from gpu_worker.prompts import render, template_stops
from gpu_worker.request import DEFAULT_MAX_TOKENS, Job
from gpu_worker.residency import Residency
from gpu_worker.row import Row, Sink
from gpu_worker.sampling import sample
from gpu_worker.scheduler import schedule
from gpu_worker.text_stream import TextStream

logger = logging.getLogger(__name__)


class Engine:
    """One base model and its bank, stepped by one thread.

    `prepare` may be called from any thread; `submit`, `cancel` and `step` only from the one that steps.
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
        self.kv_cache = KvCache(
            num_layers=self.base.num_layers,
            num_rows=config.max_batch_size,
            num_heads=self.base.num_kv_heads,
            max_len=self.max_len,
            head_dim=self.base.head_dim,
            dtype=self.base.dtype,
        )
        self.loaded = threading.Event()
        self.on_loaded: Callable[[], None] = self.loaded.set
        self.loader = AdapterLoader(
            fetch,
            check=self.bank.check,
            executor=executor or ThreadPoolExecutor(config.load_threads, thread_name_prefix="adapter-load"),
            budget_bytes=config.host_cache_bytes,
            on_done=lambda: self.on_loaded(),
        )
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self.num_steps = 0

    def prepare(self, job: Job, sink: Sink, *, keep_logits: bool = False) -> Row:
        """The job as a row: rendered, tokenized, checked. Raises: PromptInvalid, PromptTooLong."""
        stops = job.sampling.stop
        if isinstance(job.prompt, str):
            text = job.prompt
        else:
            text = render(job.prompt, job.template, self.base.tokenizer)
            stops += template_stops(job.template)
        tokens: list[int] = self.base.tokenizer(text).input_ids
        if not tokens:
            raise PromptInvalid("the prompt is empty")
        end_ids = frozenset(job.sampling.stop_token_ids)
        return Row(
            request_id=job.request_id,
            plan=job.plan,
            sampling=job.sampling,
            tokens=tokens,
            num_prompt_tokens=len(tokens),
            max_new_tokens=self._max_new_tokens(len(tokens), job.sampling.max_tokens),
            end_ids=end_ids if job.sampling.ignore_eos else end_ids | self.base.eos_token_ids,
            seed=secrets.randbits(63) if job.sampling.seed is None else job.sampling.seed,
            text=TextStream(self.base.backend_tokenizer, stops),
            sink=sink,
            keep_logits=keep_logits,
        )

    def submit(self, row: Row) -> None:
        """Queue the row; its adapters start loading now. Raises: EngineFull."""
        if len(self.waiting) >= self.config.max_waiting:
            raise EngineFull(f"{len(self.waiting)} requests already wait")
        row.loads = [self.loader.load(digest) for digest in row.weights_digests]
        self.waiting.append(row)

    def cancel(self, request_id: str) -> None:
        """Drop the request, wherever it is; its KV row, pins and queue place are free for the next step."""
        self.waiting = deque(row for row in self.waiting if row.request_id != request_id)
        for row in [row for row in self.running if row.request_id == request_id]:
            self._release(row)

    def fail_all(self, error: Exception) -> None:
        """End every request with `error`."""
        for row in self.running[:]:
            self._fail(row, error)
        while self.waiting:
            self.waiting.popleft().sink(error)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def step(self) -> bool:
        """Admit what can run, compute one packed step, sample. False when nothing could run: all wait for loads."""
        self._admit()
        if not self.running:
            return False
        scheduled = schedule(self.running, self.config.max_step_tokens)
        try:
            ready = [row for row, segment in scheduled if segment.total_len == len(row.tokens)]
            logits = self._forward(scheduled)
            tokens = sample(logits, [row.draw() for row in ready])
        except Exception as exc:
            logger.exception("a step of %d rows failed", len(scheduled))
            self.fail_all(EngineStopped(f"the step failed: {exc}"))
            return True
        for row, segment in scheduled:
            row.num_computed += segment.num_tokens
        for row, token, row_logits in zip(ready, tokens, logits, strict=True):
            self._take(row, token, row_logits)
        self.num_steps += 1
        return True

    def run_until_idle(self) -> None:
        """Step until every request has ended: how code without a thread of its own drives the engine."""
        while self.has_work:
            self.loaded.clear()
            if not self.step() and self.waiting:
                self.loaded.wait()

    def _max_new_tokens(self, num_prompt_tokens: int, wanted: int | None) -> int:
        room = self.max_len - num_prompt_tokens
        if room < 1 or (wanted is not None and wanted > room):
            asked = "" if wanted is None else f" and {wanted} new ones"
            raise PromptTooLong(f"{num_prompt_tokens} prompt tokens{asked} do not fit a context of {self.max_len}")
        return min(room, DEFAULT_MAX_TOKENS) if wanted is None else wanted

    def _admit(self) -> None:
        """Move rows whose weights are loaded and fit the bank to the batch; the others wait without blocking them."""
        still_waiting: deque[Row] = deque()
        while self.waiting:
            row = self.waiting.popleft()
            if not self._try_start(row):
                still_waiting.append(row)
        self.waiting = still_waiting

    def _try_start(self, row: Row) -> bool:
        """True when the row runs or has failed, False when it must wait."""
        if self.kv_cache.num_free == 0 or not all(load.done() for load in row.loads):
            return False
        for load in row.loads:
            if (error := load.exception()) is not None:
                row.sink(error if isinstance(error, Exception) else EngineStopped(str(error)))
                return True
        try:
            if not self.residency.try_pin([load.result() for load in row.loads]):
                return False
        except PlanTooLarge as exc:
            row.sink(exc)
            return True
        row.kv_row = self.kv_cache.allocate()
        self.running.append(row)
        return True

    @torch.inference_mode()
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

    def _take(self, row: Row, token: int | None, logits: Tensor) -> None:
        if token is None:
            self._fail(row, LogitsNotFinite(f"the plan of request {row.request_id} drives the logits out of range"))
            return
        if row.keep_logits and row.first_logits is None:
            row.first_logits = logits.float().clone()
        if row.take(token) is not None:
            self._release(row)

    def _fail(self, row: Row, error: Exception) -> None:
        self._release(row)
        row.sink(error)

    def _release(self, row: Row) -> None:
        self.running.remove(row)
        self.kv_cache.free(row.kv_row, row.num_computed)
        self.residency.unpin(row.weights_digests)
