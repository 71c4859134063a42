"""Which engine the settings start, and the reasons for which none starts."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

import pytest

from gpu_worker.config import WorkerConfig
from gpu_worker.errors import WorkerConfigInvalid
from gpu_worker.front.request.request import Completion
from gpu_worker.native.engine import NativeEngine
from gpu_worker.start import start_engine
from lora_store.adapter import AdapterWeights
from tests.gpu_worker.engine_driver import greedy
from tests.tiny import tiny_config


def no_fetch(digest: str) -> Future[AdapterWeights]:
    raise AssertionError("nothing is fetched")


def test_the_native_engine_is_started_and_answers(tiny_folders: Mapping[str, Path]) -> None:
    async def run() -> list[Completion | Exception]:
        engine = await start_engine(tiny_config(tiny_folders["llama"], engine="native"), no_fetch)
        assert isinstance(engine, NativeEngine)
        try:
            return await engine.generate([greedy("x", num_new=4)])
        finally:
            engine.stop()

    [completion] = asyncio.run(asyncio.wait_for(run(), 60))
    assert isinstance(completion, Completion) and completion.num_new_tokens == 4


def test_an_engine_whose_package_is_missing_is_refused_with_the_remedy() -> None:
    with pytest.raises(WorkerConfigInvalid, match=r"'vllm' needs the package vLLM.*docs/how-to/install\.md"):
        asyncio.run(start_engine(WorkerConfig(engine="vllm"), no_fetch, is_installed=lambda package: False))


@pytest.mark.parametrize(
    ("name", "value"), [("max_chunk_tokens", 64), ("prompt_lookup_tokens", 4), ("prefix_cache_share", 0.5)]
)
def test_a_setting_that_the_vllm_engine_lacks_is_refused_with_the_remedy(name: str, value: float) -> None:
    with pytest.raises(
        WorkerConfigInvalid,
        match=f"^{name} is a setting of the engine 'native', got {value} with engine 'vllm'; leave it unset, or use",
    ):
        WorkerConfig(engine="vllm", **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"), [("tensor_parallel_size", 2), ("enforce_eager", True), ("fusion_rank_rows", 8)]
)
def test_a_setting_that_the_native_engine_lacks_is_refused_with_the_remedy(name: str, value: object) -> None:
    with pytest.raises(
        WorkerConfigInvalid, match=f"^{name} is a setting of the engine 'vllm', got {value} .*; leave it unset"
    ):
        WorkerConfig(**{name: value})
    assert getattr(WorkerConfig(engine="vllm", **{name: value}), name) == value
