"""The bytes of a stage count until it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.api.adapters import PublishItem
from deployments.byte_budget import ByteBudget
from deployments.errors import UploadMemoryFull
from deployments.publishing.source_folders import open_folder


def test_uploads_folders_and_sources_count_until_they_are_staged(tmp_path: Path) -> None:
    folder = tmp_path / "pool" / "poet"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_bytes(b"x" * 30)
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 20)
    (folder / "optimizer.pt").write_bytes(b"x" * 999)
    prefixes = [f"file://{tmp_path}/pool"]
    cases = {
        "upload": (PublishItem(name="x", files={"a": b"x" * 50}), 50),
        "folder": (PublishItem(folder), 50),
        "source": (PublishItem(source=f"file://{folder}"), 50),
    }
    budget = ByteBudget(60)
    for upload, num_bytes in cases.values():
        with open_folder(upload, prefixes, 1000, budget, wait_s=0.01):
            assert budget.num_bytes == num_bytes
            with pytest.raises(UploadMemoryFull), open_folder(upload, prefixes, 1000, budget, wait_s=0.01):
                pass
        assert budget.num_bytes == 0
    assert len(cases) == 3
