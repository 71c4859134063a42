"""Start an engine in the conformance tests, give it adapters and send it jobs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import psutil

from gpu_worker.bank.loader import Fetch
from gpu_worker.config import WorkerConfig
from gpu_worker.engine import InferenceEngine
from gpu_worker.errors import AdapterLoadFailed
from gpu_worker.front.engine_status import EngineStatus
from gpu_worker.front.request.request import Completion, Delta, Job, Prompt, SamplingParams
from lora_store.adapter import AdapterWeights
from lora_store.plan import BASE_PLAN, Plan

T = TypeVar("T")
PATIENCE_S = 120  # only a failing test waits this long
START_S = 600  # vLLM starts two processes, each of which imports all of it
NAN = float("nan")
EOS_ID = 257  # most tests serve a model that ends an answer with this id or with `TURN_END_ID`
MARKER, TURN_END, TURN_END_ID = "[TOOL_CALLS]", "<turn>", 260
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=20)


class StartEngine(Protocol):
    """Starts an engine whose free bank rows have the value `free_fill`. Runs inside an event loop."""

    async def __call__(self, config: WorkerConfig, fetch: Fetch, *, free_fill: float) -> InferenceEngine: ...


class HostedEngine:
    """An engine in an event loop of its own thread, and the pool that it fetches adapters from."""

    def __init__(self, start: StartEngine, config: WorkerConfig) -> None:
        self.start, self.config = start, config
        self.pool: dict[str, AdapterWeights] = {}
        self.held: dict[str, Future[AdapterWeights]] = {}  # fetches that the test ends itself
        self.fetched: list[str] = []
        self.children_before = psutil.Process().children(recursive=True)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

        async def build() -> InferenceEngine:
            return await start(config, self._fetch, free_fill=NAN)

        self.engine = self.run(build(), START_S)

    def run(self, main: Coroutine[Any, Any, T], within_s: float = PATIENCE_S) -> T:
        """Run the coroutine in the engine's event loop and return its result."""
        return asyncio.run_coroutine_threadsafe(main, self._loop).result(within_s)

    def add(self, *pool: AdapterWeights) -> None:
        """Put these adapters into the pool."""
        self.pool |= {weights.weights_digest: weights for weights in pool}

    def outcomes(self, *jobs: Job) -> list[Completion | Exception]:
        """Answer all jobs together."""
        return self.run(self.engine.generate(jobs))

    def answers(self, *jobs: Job) -> list[Completion]:
        """Answer all jobs together; none may fail."""
        return [answer for outcome in self.outcomes(*jobs) for answer in [_answer(outcome)]]

    def error(self, job: Job) -> Exception:
        """Return the job's error."""
        [outcome] = self.outcomes(job)
        assert isinstance(outcome, Exception), outcome
        return outcome

    def status(self) -> EngineStatus:
        return self.run(self.engine.status())

    def forget_all(self) -> None:
        """Remove everything of the pool from the engine."""
        assert self.run(self.engine.forget(list(self.pool)))
        self.pool.clear()
        self.fetched.clear()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self.engine.stop)

        async def settle() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.run(settle())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _fetch(self, digest: str) -> Future[AdapterWeights]:
        self.fetched.append(digest)
        if digest in self.held:
            return self.held[digest]
        fetched: Future[AdapterWeights] = Future()
        if digest in self.pool:
            fetched.set_result(self.pool[digest])
        else:
            fetched.set_exception(AdapterLoadFailed(f"no adapter {digest[:12]}"))
        return fetched


Serve = Callable[..., HostedEngine]  # the fixture `serve`
MakeAdapter = Callable[..., AdapterWeights]  # the fixture `adapter`


def job(prompt: Prompt, plan: Plan = BASE_PLAN, sampling: SamplingParams = GREEDY, **changes: Any) -> Job:
    """Return a greedy job, with log probabilities of the first tokens."""
    return Job("conformance", prompt, plan, sampling, **changes)


def tokens_of(answer: Completion) -> list[bytes]:
    """Return the tokens of the answer's text, in which a byte tokenizer does not distinguish invalid bytes."""
    return [entry.token for entry in answer.logprobs if not entry.is_end]


def assert_same(found: Sequence[Completion], expected: Sequence[Completion], tolerance: float) -> None:
    """Check that answers are equal: the same tokens, and log probabilities within the tolerance."""
    assert [tokens_of(answer) for answer in found] == [tokens_of(answer) for answer in expected]
    assert [answer.text for answer in found] == [answer.text for answer in expected]
    for one, other in zip(found, expected, strict=True):
        for entry, known in zip(one.logprobs, other.logprobs, strict=True):
            alternatives, known_alternatives = dict(entry.top), dict(known.top)
            for token in alternatives.keys() & known_alternatives.keys():
                assert abs(alternatives[token] - known_alternatives[token]) <= tolerance


async def collect(engine: InferenceEngine, asked: Job, until: Callable[[list[Delta]], bool]) -> list[Delta]:
    """Stream the job's deltas, and leave the stream as soon as `until` is true."""
    found: list[Delta] = []
    stream = engine.stream(asked)
    try:
        async for delta in stream:
            if delta is not None:
                found.append(delta)
            if until(found):
                break
    finally:
        await stream.aclose()
    return found


def _answer(outcome: Completion | Exception) -> Completion:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
