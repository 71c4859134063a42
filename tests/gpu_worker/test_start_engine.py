"""Which engine the settings start, and the reasons for which none starts."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

import pytest

from gpu_worker.config import WorkerConfig
from gpu_worker.errors import WorkerConfigInvalid
from gpu_worker.native_engine import NativeEngine
from gpu_worker.request.request import Completion
from gpu_worker.start_engine import start_engine
from lora_store.adapter import AdapterWeights
from tests.gpu_worker.engine_driver import greedy
from tests.tiny import tiny_config


def no_fetch(digest: str) -> Future[AdapterWeights]:
    raise AssertionError("nothing is fetched")


def test_the_native_engine_is_started_and_answers(tiny_folders: Mapping[str, Path]) -> None:
    async def run() -> list[Completion | Exception]:
        engine = start_engine(tiny_config(tiny_folders["llama"], engine="native"), no_fetch)
        assert isinstance(engine, NativeEngine)
        try:
            return await engine.generate([greedy("x", num_new=4)])
        finally:
            engine.stop()

    [completion] = asyncio.run(asyncio.wait_for(run(), 60))
    assert isinstance(completion, Completion) and completion.num_new_tokens == 4


def test_an_engine_whose_package_is_missing_is_refused_with_the_remedy() -> None:
    with pytest.raises(WorkerConfigInvalid, match=r"'vllm' needs the package vLLM.*docs/how-to/install\.md"):
        start_engine(WorkerConfig(engine="vllm"), no_fetch, is_installed=lambda package: False)


def test_a_setting_that_the_vllm_engine_lacks_is_refused_with_the_remedy() -> None:
    with pytest.raises(WorkerConfigInvalid, match="max_chunk_tokens is a setting of the native engine, got 64"):
        WorkerConfig(engine="vllm", max_chunk_tokens=64)
    with pytest.raises(WorkerConfigInvalid, match="prompt_lookup_tokens is a setting of the native engine, got 4"):
        WorkerConfig(engine="vllm", prompt_lookup_tokens=4)


@pytest.mark.parametrize(("name", "value"), [("tensor_parallel_size", 2), ("enforce_eager", True)])
def test_a_setting_that_the_native_engine_lacks_is_refused_with_the_remedy(name: str, value: object) -> None:
    with pytest.raises(WorkerConfigInvalid, match=f"^{name} .*with engine 'native'.*; (use engine 'vllm'|leave it)"):
        WorkerConfig(**{name: value})
    assert getattr(WorkerConfig(engine="vllm", **{name: value}), name) == value
