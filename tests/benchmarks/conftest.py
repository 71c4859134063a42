"""A tiny study shared by the tests of its stages: adapters trained on a tiny model, behind the server's code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from benchmarks import results_file
from benchmarks.paper.answering.answers import Asker
from benchmarks.paper.answering.runs import Bench, pool_retriever
from benchmarks.paper.answering.study import Study, Weights, load_asker, load_study
from benchmarks.paper.common.workspace import Workspace
from benchmarks.paper.pool.train_pool import train_all
from benchmarks.paper.stages.stage import Loaded
from gpu_worker.config import NativeWorkerConfig
from lora_store import LoraStore
from retriever_svc import Encoder, ProjectionFiles
from tests.benchmarks.bigbench import write_archive
from tests.benchmarks.tiny_study import RECIPE, SPECS, examples
from tests.gpu_worker.conftest import make_engine, shapes  # noqa: F401  fixtures
from tests.shared_encoders import shared_encoder
from tests.tiny import tiny_config


@pytest.fixture(autouse=True)
def any_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let benchmarks write results from a tree with local changes."""
    monkeypatch.setattr(results_file, "commit", lambda: "0123456789ab")


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_folders: Mapping[str, Path]) -> Workspace:
    """Return a workspace with an adapter per task, trained on the tiny model."""
    made = Workspace(tmp_path_factory.mktemp("study"))
    write_archive(made.archive, {spec.path: examples(spec.name) for spec in SPECS})
    with Progress(disable=True) as progress:
        train_all(SPECS, made, tiny_folders["gemma3"], progress, lambda _: RECIPE)
    return made


@pytest.fixture(scope="session")
def config(tiny_folders: Mapping[str, Path]) -> NativeWorkerConfig:
    return tiny_config(tiny_folders["gemma3"], max_model_len=400, max_step_tokens=600, max_wait_s=1e6)


@pytest.fixture(scope="session")
def study(workspace: Workspace, config: NativeWorkerConfig) -> Study:
    return load_study(SPECS, workspace, config)


@pytest.fixture(scope="session")
def asked(workspace: Workspace, config: NativeWorkerConfig) -> tuple[Asker, LoraStore, Weights]:
    return load_asker(workspace, config, [spec.name for spec in SPECS])


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return shared_encoder()


@pytest.fixture(scope="session")
def projected(encoder: Encoder) -> Encoder:
    return encoder.projected(ProjectionFiles().shipped(encoder.identity))


@pytest.fixture(scope="session")
def bench(study: Study, asked: tuple[Asker, LoraStore, Weights], encoder: Encoder) -> Bench:
    return Bench(study, asked[0], pool_retriever(study, asked[0], encoder), Console(quiet=True))


@pytest.fixture(scope="session")
def loaded(bench: Bench, asked: tuple[Asker, LoraStore, Weights], encoder: Encoder) -> Loaded:
    return Loaded(bench, asked[1], asked[2], encoder)
