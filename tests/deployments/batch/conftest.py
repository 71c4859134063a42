"""One store with adapters for all tests of offline runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from deployments.config.app import AppConfig
from gpu_worker.model.base_model import load_base_model
from tests.deployments.batching import TOPICS, Place, publish, tiny_app
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


@pytest.fixture
def place(pool: AppConfig, tmp_path: Path) -> Place:
    return Place(tmp_path, pool)
