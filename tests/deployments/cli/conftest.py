from __future__ import annotations

from pathlib import Path

import pytest

from tests.deployments.adapter_records import BASE, write_random_folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(f"base_model: somewhere/{BASE}\nstore_uri: {tmp_path / 'pool'}\n")
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write an adapter that the server accepts."""
    return write_random_folder(tmp_path / "poet", 0, ["Rhyme.", "Sing."])
