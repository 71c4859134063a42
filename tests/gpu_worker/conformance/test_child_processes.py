"""The death of one of vLLM's processes: every job ends at once, and the engine is not healthy. Needs vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gpu_worker.errors import EngineStopped
from gpu_worker.request.request import SamplingParams
from tests.gpu_worker.conformance.driver import HostedEngine, job
from tests.gpu_worker.conformance.engines import ENGINES
from tests.tiny import tiny_config

ENDLESS = SamplingParams(max_tokens=140, temperature=0, ignore_eos=True)


@pytest.fixture
def hosted(model_folder: Path) -> Iterator[HostedEngine]:
    engine = HostedEngine(ENGINES["vllm"], tiny_config(model_folder))
    yield engine
    engine.close()


def test_the_death_of_a_process_ends_every_job_and_the_engine(hosted: HostedEngine) -> None:
    async def kill() -> list[object]:
        running = asyncio.create_task(hosted.engine.generate([job("running", sampling=ENDLESS)] * 12))
        while not (await hosted.engine.status()).num_running:
            await asyncio.sleep(0)
        new = [child for child in psutil.Process().children(recursive=True) if child not in hosted.children_before]
        workers = [child for child in new if "Worker" in child.name() or "EngineCore" in child.name()]
        assert workers, [child.name() for child in new]
        workers[-1].kill()
        return list(await running)

    assert all(isinstance(outcome, EngineStopped) for outcome in hosted.run(kill()))
    health = hosted.engine.health()
    assert not health.is_alive and health.failure
