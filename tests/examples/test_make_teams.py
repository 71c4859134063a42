"""Sixty adapters of three teams: each with weights and samples of its own."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from examples.make_teams import OFFICES, SAMPLES_PER_ADAPTER, write_teams


def test_every_adapter_has_weights_and_samples_of_its_own(tmp_path: Path) -> None:
    folders = write_teams(tmp_path)
    assert len(folders) == 60 and len({(folder.parent.name, folder.name) for folder in folders}) == 60
    weights = {hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).digest() for folder in folders}
    assert len(weights) == 55  # two teams have the five adapters that form questions
    for folder in folders:
        lines = (folder / "lora_samples.jsonl").read_text(encoding="utf-8").splitlines()
        [office] = [office for office in OFFICES if folder.name.endswith(f"-{office.lower()}")]
        assert len(lines) == SAMPLES_PER_ADAPTER
        assert all(json.loads(line)["input"].startswith(f"{office} office: ") for line in lines)
