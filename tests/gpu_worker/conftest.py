"""Fixtures of the worker's tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from functools import cache
from typing import Any

import pytest

from gpu_worker.bank.layout_kernel import LayoutKernel
from gpu_worker.bank.loader import Fetch
from gpu_worker.front.grammar.compiler import CheckProcess
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.front.request.request import Job
from gpu_worker.model.base_model import BaseModel
from gpu_worker.model.lora_kernel import LoraKernel
from gpu_worker.native import loop
from gpu_worker.native.attention.kv_cache import KvCache, KvShape
from gpu_worker.native.engine import NativeEngine
from gpu_worker.native.kernels import kernel_loading
from gpu_worker.native.loop import Engine
from gpu_worker.native.sampling.sampling import Sampler
from gpu_worker.native.sampling.sampling_kernel import SamplingKernel
from lora_store.adapter import AdapterWeights
from tests.gpu_worker.engine_driver import (
    Answer,
    Gate,
    MakeEngine,
    Start,
    always_says,
    compiled,
    fetching,
    fingerprint,
    run_together,
)
from tests.tiny import InlineExecutor, TinyBase, TinyFolders, linear_shapes, random_adapter, tiny_config

share_openmp_once = cache(kernel_loading.share_openmp)
RUN = CheckProcess.run
PASSED: set[str] = set()  # configurations whose model has passed the check at the start in this process


@pytest.fixture(scope="session")
def lora_kernel() -> LoraKernel:
    """Return the compiled LoRA products."""
    return compiled(LoraKernel.load)


@pytest.fixture(scope="session")
def layout_kernel() -> LayoutKernel:
    """Return the compiled conversion of adapters."""
    return compiled(LayoutKernel.load)


@pytest.fixture(params=["kernel", "torch"])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    return Sampler(compiled(SamplingKernel.load) if request.param == "kernel" else None)


@cache
def run_check(grammar: Grammar) -> None:
    """Check the grammar in its process. An error is raised, and not kept."""
    RUN(CheckProcess(), grammar)


def check_once(process: CheckProcess, grammar: Grammar) -> None:
    """Replaces `CheckProcess.run`."""
    run_check(grammar)


class Passed:
    """The check at the start of a model that has passed it in this process."""

    def run(self, *engine: object) -> None:
        """Compare nothing again."""


@pytest.fixture
def make_engine(
    tiny_folders: TinyFolders, tiny_base: TinyBase, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Engine]:
    """Return a factory of engines over a tiny model, with given adapters or a `get`; free bank rows hold NaN.

    A process shares its OpenMP runtime once, checks a model once for each configuration, and a good grammar once:
    otherwise these take two thirds of the start of a tiny engine. A `base` of the test's own is always checked, unless
    it is `known`: a name that stands for the same numbers in each call.
    """
    monkeypatch.setattr(kernel_loading, "share_openmp", share_openmp_once)
    monkeypatch.setattr(CheckProcess, "run", check_once)

    def make(
        adapters: Mapping[str, AdapterWeights] | Callable[[str], AdapterWeights],
        family: str = "gemma3",
        *,
        base: BaseModel | None = None,
        executor: Executor | None = None,
        fetch: Fetch | None = None,
        clock: Callable[[], float] = time.monotonic,
        build_kv_cache: Callable[[KvShape], KvCache] | None = None,
        known: str = "",
        **changes: object,
    ) -> Engine:
        get, executor = (
            adapters.__getitem__ if isinstance(adapters, Mapping) else adapters,
            executor or InlineExecutor(),
        )
        config = tiny_config(tiny_folders[family], **changes)
        is_known = (base is None or known != "") and build_kv_cache is None
        with monkeypatch.context() as patched:
            if is_known and f"{config} {known}" in PASSED:
                patched.setattr(loop, "ModelCheck", lambda *model: Passed())
            engine = Engine(
                config,
                fetch or fetching(get, executor),
                base=base or tiny_base(family, config.dtype),
                executor=executor,
                free_fill=float("nan"),
                clock=clock,
                build_kv_cache=build_kv_cache,
            )
        if is_known:
            PASSED.add(f"{config} {known}")
        return engine

    return make


@pytest.fixture(scope="session")
def shapes(tiny_base: TinyBase) -> dict[str, tuple[int, int]]:
    """Return (out, in) of every module of the tiny gemma3 model that an adapter may target."""
    return linear_shapes(tiny_base())


@pytest.fixture
def pool(shapes: dict[str, tuple[int, int]]) -> list[AdapterWeights]:
    """Two adapters for every module."""
    return [random_adapter(shapes, seed, rank=3) for seed in (1, 2)]


@pytest.fixture(scope="session")
def lone_answers() -> dict[bytes, Answer]:
    """Return a cache of answers of new engines by job. Many tests compare with the same ones."""
    return {}


@pytest.fixture
def alone(
    make_engine: MakeEngine, lone_answers: dict[bytes, Answer]
) -> Callable[[Job, Mapping[str, AdapterWeights]], Answer]:
    """Return the job's answer from a new engine without other jobs."""

    def run(job: Job, adapters: Mapping[str, AdapterWeights]) -> Answer:
        asked = fingerprint(job, adapters)
        if asked not in lone_answers:
            [lone_answers[asked]] = run_together(make_engine(adapters), [job])
        return lone_answers[asked]

    return run


@pytest.fixture
def start() -> Iterator[Callable[[Engine], NativeEngine]]:
    """Return a starter of engine threads, which are stopped at the end of the test."""
    started: list[NativeEngine] = []

    def make(engine: Engine, *, stream_interval_ms: float = 0.0) -> NativeEngine:
        started.append(NativeEngine(engine, stream_interval_ms=stream_interval_ms))
        return started[-1]

    yield make
    for native in started:
        if native.health().is_alive:
            native.stop()


@pytest.fixture
def gated(make_engine: MakeEngine, start: Start) -> Iterator[Callable[..., tuple[Engine, Gate, NativeEngine]]]:
    """Return a maker of engines with a gate, which opens before the thread stops, and a thread.

    Each token is a letter, so each step has a delta.
    """
    gates: list[Gate] = []

    def make(*args: Any, **changes: Any) -> tuple[Engine, Gate, NativeEngine]:
        engine = make_engine(*args, **changes)
        [letter] = engine.base.tokenizer("a", add_special_tokens=False).input_ids
        always_says(engine.base.model, letter)
        gates.append(Gate(engine.base.model))
        return engine, gates[-1], start(engine)

    yield make
    for gate in gates:
        gate.open()
