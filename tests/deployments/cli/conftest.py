from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_store import ModuleWeights, Sample, write_peft_folder
from tests.deployments.adapter_records import BASE


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(f"base_model: somewhere/{BASE}\nstore_uri: {tmp_path / 'pool'}\n")
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write an adapter that the server accepts."""
    path = tmp_path / "poet"
    weights = {"model.layers.0.mlp.up_proj": ModuleWeights(torch.ones(2, 6), torch.ones(8, 2), 2.0)}
    write_peft_folder(path, weights, base_model=BASE, samples=[Sample("Rhyme."), Sample("Sing.")])
    return path
