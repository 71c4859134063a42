"""vLLM's processes: what is withdrawn leaves them, and the death of one ends every job at once. Needs vLLM."""

from __future__ import annotations

import asyncio
import logging.handlers
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from gpu_worker.errors import BaseModelUnsupported, EngineStopped, WarmUpFailed
from gpu_worker.front.request.request import SamplingParams
from tests.gpu_worker.conformance.driver import HostedEngine, MakeAdapter, job
from tests.gpu_worker.conformance.engines import ENGINES
from tests.soak import Scale
from tests.tiny import TinyFolders, plan_of, tiny_config

ENDLESS = SamplingParams(max_tokens=140, temperature=0, ignore_eos=True)
ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
MOST_GROWTH = 32 << 20  # bytes of all processes; one adapter takes 60 kB


@contextmanager
def children_print_into(path: Path) -> Iterator[None]:
    """Let the processes that are started within the block print into the file."""
    before = os.dup(1)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("printed") / "stdout"


@pytest.fixture(scope="module")
def own_log() -> logging.handlers.MemoryHandler:
    """Return a handler of this process, as a replica has them for its files. Closing it takes its target away."""
    return logging.handlers.MemoryHandler(1, target=logging.NullHandler())


@pytest.fixture(scope="module")
def own_engine(model_folder: Path, printed: Path, own_log: logging.Handler) -> Iterator[HostedEngine]:
    with children_print_into(printed):
        engine = HostedEngine(ENGINES["vllm"], tiny_config(model_folder, engine="vllm"))
    yield engine
    engine.close()


@pytest.fixture
def hosted(own_engine: HostedEngine) -> HostedEngine:
    return own_engine


def children_of(hosted: HostedEngine) -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child not in hosted.children_before]


def test_the_processes_print_their_logs_once_and_no_prompt(
    hosted: HostedEngine, printed: Path, own_log: logging.handlers.MemoryHandler
) -> None:
    [answer] = hosted.answers(job("a secret", sampling=ONE_TOKEN))
    assert answer.num_new_tokens == 1
    lines = [line for line in printed.read_text().splitlines() if " INFO " in line]
    assert len([line for line in lines if "Initializing a V1 LLM engine" in line]) == 1
    assert all(line.startswith(("(EngineCore pid=", "(Worker pid=")) for line in lines)
    assert "secret" not in printed.read_text()
    assert own_log.target is not None, "vLLM has closed the logs of this process"


def test_cycles_of_use_and_withdrawal_leave_nothing_in_the_processes(
    hosted: HostedEngine, adapter: MakeAdapter, scale: Scale
) -> None:
    def cycle(seed: int) -> None:
        weights, other = adapter(seed, rank=1 + seed % 8), adapter(1000 + seed)
        plans = [plan_of("selection", (weights, 1.0)), plan_of("fusion", (weights, 0.5), (other, 0.5))]
        hosted.answers(*[job("cycle", plan, ONE_TOKEN) for plan in plans])
        hosted.forget_all()

    def num_bytes() -> int:
        return sum(child.memory_info().rss for child in children_of(hosted))

    for seed in range(4):
        cycle(seed)
    before = num_bytes()
    for seed in range(scale.pick("cycles of an adapter", small=12, full=100)):
        cycle(seed)
    scale.record("MiB that vLLM's processes grew by", (num_bytes() - before) / 2**20)
    assert num_bytes() - before < MOST_GROWTH
    [bank] = hosted.run(hosted.engine._llm.collective_rpc("describe_bank"))  # type: ignore[attr-defined]
    assert bank["resident"] == [] and bank["ends"].keys() == hosted.engine.module_shapes.keys()


def test_the_death_of_a_process_ends_every_job_and_the_engine(hosted: HostedEngine) -> None:
    """The last test of the engine."""

    async def kill() -> list[object]:
        running = asyncio.create_task(hosted.engine.generate([job("running", sampling=ENDLESS)] * 12))
        while not (await hosted.engine.status()).num_running:
            await asyncio.sleep(0)
        names = [(child.name(), child) for child in children_of(hosted)]
        workers = [child for name, child in names if "Worker" in name or "EngineCore" in name]
        assert workers, names
        workers[-1].kill()
        return list(await running)

    assert all(isinstance(outcome, EngineStopped) for outcome in hosted.run(kill()))
    health = hosted.engine.health()
    assert not health.is_alive and health.failure


def test_the_error_that_ends_a_process_at_start_is_named(tiny_folders: TinyFolders) -> None:
    """vLLM's attention has no heads of 8 values on the CPU, and only its worker knows."""
    with pytest.raises(WarmUpFailed, match=r"^vLLM did not start: \w+: .*head_dim=8"):
        HostedEngine(ENGINES["vllm"], tiny_config(tiny_folders["llama"], engine="vllm"))


def test_a_checkpoint_without_a_layer_is_refused_before_a_process_starts(
    tiny_folders: TinyFolders, tmp_path: Path
) -> None:
    folder = tmp_path / "part"
    shutil.copytree(tiny_folders["llama"], folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    before = len(psutil.Process().children(recursive=True))
    with pytest.raises(BaseModelUnsupported, match="lacks weights: 9 of the model's"):
        HostedEngine(ENGINES["vllm"], tiny_config(folder, engine="vllm"))
    assert len(psutil.Process().children(recursive=True)) == before
