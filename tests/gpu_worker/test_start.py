"""Which engine the settings start, and the reasons for which none starts."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

import pytest

from gpu_worker.config import VllmWorkerConfig
from gpu_worker.errors import WorkerConfigInvalid
from gpu_worker.front.request.request import Completion
from gpu_worker.native.engine import NativeEngine
from gpu_worker.start import start_engine
from lora_store.adapter import AdapterWeights
from tests.gpu_worker.engine_driver import greedy
from tests.tiny import TinyFolders, tiny_config


def no_fetch(digest: str) -> Future[AdapterWeights]:
    raise AssertionError("nothing is fetched")


def test_the_native_engine_is_started_and_answers(tiny_folders: TinyFolders) -> None:
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
        asyncio.run(start_engine(VllmWorkerConfig(), no_fetch, is_installed=lambda package: False))
