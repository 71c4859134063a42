"""Submit jobs to an engine in tests and inspect the results."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gpu_worker.bank.loader import Fetch
from gpu_worker.engine import InferenceEngine
from gpu_worker.front.request.request import Completion, Delta, Job, SamplingParams
from gpu_worker.front.row import Row
from gpu_worker.native.attention.kv_cache import KvShape
from gpu_worker.native.attention.kv_pages import HostKvCache
from gpu_worker.native.engine import NativeEngine
from gpu_worker.native.loop import Engine
from lora_store.adapter import AdapterWeights
from lora_store.location import DEFAULT_CACHE_DIR
from lora_store.plan import BASE_PLAN, Plan
from tests.tiny import assert_equal_logits, plan_of

Made = TypeVar("Made")


@dataclass
class Answer:
    """One submitted job and everything that its sink received."""

    row: Row
    events: list[Delta | Exception]

    @property
    def error(self) -> Exception | None:
        last = self.events[-1] if self.events else None
        return last if isinstance(last, Exception) else None

    @property
    def is_finished(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Delta) and self.events[-1].finish_reason is not None

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta))

    @property
    def tokens(self) -> list[int]:
        """Return the new tokens of an answer that ended well."""
        assert self.is_finished, self.error
        return self.row.tokens[self.row.num_prompt_tokens :]

    @property
    def first_logits(self) -> Tensor:
        assert self.row.first_logits is not None
        return self.row.first_logits


PATIENCE_S = 60  # only a failing test waits this long
MakeEngine = Callable[..., Engine]  # the fixture `make_engine`
Start = Callable[..., NativeEngine]  # the fixture `start`
Alone = Callable[[Job, Mapping[str, AdapterWeights]], Answer]  # the fixture `alone`
Shapes = dict[str, tuple[int, int]]  # the fixture `shapes`


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """Return the coroutine's result. Raises: TimeoutError if it hangs."""
    return asyncio.run(asyncio.wait_for(main, PATIENCE_S))


class HeldExecutor(Executor):
    """Holds submitted work until `release`, in order."""

    def __init__(self) -> None:
        self.held: list[Callable[[], object]] = []

    def submit(self, fn: Callable[..., object], /, *args: object, **kwargs: object) -> Future:  # type: ignore[override]
        self.held.append(lambda: fn(*args, **kwargs))
        return Future()

    def release(self) -> None:
        """Run the held work, and work that it submits."""
        while self.held:
            self.held.pop(0)()


def fetching(get: Callable[[str], AdapterWeights], executor: Executor) -> Fetch:
    """Return a fetch that runs `get` on the executor."""

    def fetch(digest: str) -> Future[AdapterWeights]:
        fetched: Future[AdapterWeights] = Future()

        def run() -> None:
            try:
                fetched.set_result(get(digest))
            except Exception as exc:
                fetched.set_exception(exc)

        executor.submit(run)
        return fetched

    return fetch


class Gate:
    """A forward hook that lets the engine take one step per permit, and counts the steps that have begun."""

    def __init__(self, model: nn.Module) -> None:
        self.permits = threading.Semaphore(0)
        self._arrivals = threading.Semaphore(0)
        model.register_forward_pre_hook(lambda module, inputs: self._pass())
        self._is_open = False

    def wait_for_step(self) -> None:
        """Wait until the next step has started, which then waits for its permit."""
        assert self._arrivals.acquire(timeout=120), "no step began"

    def open(self) -> None:
        """Let every later step through."""
        self._is_open = True
        self.permits.release()

    def _pass(self) -> None:
        self._arrivals.release()
        if not self._is_open:
            self.permits.acquire()


Gated = Callable[..., tuple[Engine, Gate, NativeEngine]]  # the fixture `gated`


class BrokenSink(Exception):
    """The error of a sink whose client is gone."""


def always_says(model: PreTrainedModel, token: int) -> None:
    """Make the model choose `token` next, whatever came before."""

    def prefer(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[..., token] = 1e4
        return logits

    model.get_output_embeddings().register_forward_hook(prefer)


def greedy(prompt: str, plan: Plan = BASE_PLAN, request_id: object = 0, num_new: int = 8) -> Job:
    sampling = SamplingParams(max_tokens=num_new, temperature=0, ignore_eos=True)
    return Job(str(request_id), prompt, plan, sampling)


BASE_JOB = greedy("the base model alone", BASE_PLAN, "base")


def only(weights: AdapterWeights) -> Plan:
    """A plan of one adapter with weight 1."""
    return plan_of("selection", (weights, 1.0))


async def stream_text(engine: InferenceEngine, job: Job) -> AsyncGenerator[Delta]:
    """Stream the job's deltas without heartbeats."""
    async with aclosing(engine.stream(job)) as deltas:
        async for delta in deltas:
            if delta is not None:
                yield delta


async def complete(engine: InferenceEngine, job: Job) -> tuple[Completion, Delta]:
    """Stream the job to its end. Return the whole answer and its last delta."""
    deltas = [delta async for delta in stream_text(engine, job)]
    return Completion.joined(deltas), deltas[-1]


def steps(engine: Engine, count: int) -> None:
    for _ in range(count):
        engine.step()


def ask(engine: Engine, job: Job) -> Answer:
    """Submit the job. The answer grows as the engine steps."""
    events: list[Delta | Exception] = []
    row = engine.prepare(job, events.append, capture_first_logits=True)
    engine.submit(row)
    return Answer(row, events)


def run_together(engine: Engine, jobs: Sequence[Job]) -> list[Answer]:
    """Run all jobs in one batch to the end."""
    answers = [ask(engine, job) for job in jobs]
    engine.run_until_idle()
    return answers


def fingerprint(job: Job, adapters: Mapping[str, AdapterWeights]) -> bytes:
    """Return a digest of all that decides a job's answer: the request, and the tensors of its adapters."""
    digest = hashlib.sha256(repr(replace(job, request_id="")).encode())
    for planned in job.plan.adapters:
        for name, module in adapters[planned.weights_digest].modules.items():
            digest.update(f"{name} {module.scaling}".encode())
            for tensor in (module.lora_a, module.lora_b):
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.digest()


def compiled(load: Callable[[Path], Made | None]) -> Made:
    """Return the kernel of `load`. Without a compiler skip the test; in CI fail. With one the kernel must be there."""
    found = load(DEFAULT_CACHE_DIR)
    if found is None:
        assert shutil.which(os.environ.get("CXX", "c++")) is None, f"{load.__qualname__} returns no kernel"
        (pytest.fail if os.environ.get("CI_REQUIRES_COMPILER") else pytest.skip)("no C++ compiler (Debian package g++)")
    return found


def kv_shape(**changes: Any) -> KvShape:
    """Return the shape of a cache for three rows of five tokens, with these changes."""
    shape = KvShape(
        num_layers=2, num_heads=2, head_dim=4, dtype=torch.float32, num_rows=3, max_len=5, num_tokens=15, page_tokens=5
    )
    return replace(shape, **changes)


def by_digest(*pool: AdapterWeights) -> Mapping[str, AdapterWeights]:
    return {weights.weights_digest: weights for weights in pool}


def assert_nothing_held(engine: Engine) -> None:
    """Check that every KV row and page is free and clean, nothing is pinned, and no row waits or runs."""
    assert not engine.has_work
    assert engine.residency.num_pins == 0
    assert engine.residency.active_rows == 0
    assert engine.kv_cache.num_free == engine.config.max_batch_size
    assert engine.kv_cache.num_free_tokens == engine.memory.kv.num_tokens
    assert isinstance(engine.kv_cache, HostKvCache)
    engine.kv_cache.forget()
    assert engine.kv_cache.num_cached_tokens == 0
    assert not any(store.any() for store in engine.kv_cache.stores)


def assert_same(found: Answer, expected: Answer) -> None:
    assert found.tokens == expected.tokens
    assert found.text == expected.text
    assert_equal_logits(found.first_logits, expected.first_logits)
