"""The engine as a whole: its self-description, its health and its end."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_worker.errors import EngineStopped
from gpu_worker.front.request.request import SamplingParams
from tests.gpu_worker.conformance.driver import HostedEngine, job

ENDLESS = SamplingParams(max_tokens=240, temperature=0, ignore_eos=True)


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder for temporary files; its path is short, as those of sockets must be."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture
def own(session_engine: HostedEngine, scratch: Path) -> Iterator[HostedEngine]:
    """Return a second engine of the same kind, which the test may end."""
    hosted = HostedEngine(session_engine.start, session_engine.config)
    yield hosted
    hosted.close()


def test_an_engine_describes_itself_and_is_healthy(hosted: HostedEngine) -> None:
    engine = hosted.engine
    assert engine.num_missing_kernels == 0
    shapes = engine.module_shapes
    assert shapes["model.layers.0.self_attn.q_proj"] == (128, 64)
    assert shapes["model.layers.2.mlp.down_proj"] == (64, 96)
    assert len(shapes) == 3 * 7
    health = engine.health()
    assert health.is_alive and health.failure is None


def test_counters_rise_with_each_job(hosted: HostedEngine) -> None:
    before = hosted.status().counters
    [answer] = hosted.answers(job("count me"))
    after = hosted.status().counters
    assert after.num_requests == before.num_requests + 1
    assert after.num_prompt_tokens == before.num_prompt_tokens + answer.num_prompt_tokens
    assert after.num_new_tokens == before.num_new_tokens + answer.num_new_tokens


def test_stopping_ends_every_job_and_refuses_later_ones(own: HostedEngine, scratch: Path) -> None:
    async def stop() -> list[object]:
        running = asyncio.create_task(own.engine.generate([job("running", sampling=ENDLESS)] * 12))
        while not (await own.engine.status()).num_running:
            await asyncio.sleep(0)
        own.engine.stop()
        return list(await running)

    assert all(isinstance(outcome, EngineStopped) for outcome in own.run(stop()))
    health = own.engine.health()
    assert not health.is_alive and health.failure
    with pytest.raises(EngineStopped):
        own.answers(job("late"))
    with pytest.raises(EngineStopped):
        own.run(own.engine.probe(["0" * 64]))
    with pytest.raises(EngineStopped):
        own.run(own.engine.forget(["0" * 64]))
    assert not list(scratch.rglob("*")), "files are left"
