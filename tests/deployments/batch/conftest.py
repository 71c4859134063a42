"""One store with adapters for all tests of offline runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from deployments.config.app import AppConfig
from deployments.config.parts import ModelSettings
from gpu_worker.model.base_model import load_base_model
from tests.deployments.batching import TOPICS, TOPICS_OF, Place, publish, tiny_app
from tests.tiny import linear_shapes, save_talkative, tiny_config


@pytest.fixture(scope="session")
def model(tiny_folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_talkative(tiny_folders["gemma3"], tmp_path_factory.mktemp("talkative"))


@pytest.fixture(scope="session")
def pool(model: Path, tmp_path_factory: pytest.TempPathFactory) -> AppConfig:
    """Return a store with five adapters at generation 1."""
    folder = tmp_path_factory.mktemp("batch-pool")
    config = tiny_app(model, str(folder / "pool"))
    assert publish(config, linear_shapes(load_base_model(tiny_config(model))), folder / "adapters", TOPICS[:5]) == 1
    return config


@pytest.fixture(scope="session")
def two_bases(model: Path, tiny_folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> AppConfig:
    """Return settings with base models of two families, and a pool with adapters for both."""
    folder = tmp_path_factory.mktemp("two-bases")
    models = {"first": model, "second": save_talkative(tiny_folders["qwen3"], folder / "second")}
    tiny = tiny_app(model, str(folder / "pool"))
    each = [
        ModelSettings(base_model=str(path), base_model_name=name, worker=tiny.worker) for name, path in models.items()
    ]
    config = AppConfig(models=tuple(each), store_uri=tiny.store_uri, retrieval=tiny.retrieval)
    for name, topics in TOPICS_OF.items():
        shapes = linear_shapes(load_base_model(tiny_config(models[name])))
        publish(config, shapes, folder / name, topics, base=name)
    return config


@pytest.fixture
def place(pool: AppConfig, tmp_path: Path) -> Place:
    return Place(tmp_path, pool)
