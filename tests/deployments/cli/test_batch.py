from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_store import LoraStore
from tests.deployments.scripted import run, words


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Write an input without rows, so that the run ends at once, and begin an empty pool."""
    LoraStore(str(tmp_path / "store"), accepts_base=[])
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "in.parquet")
    return tmp_path / "in.parquet"


def test_options_become_the_runs_settings_and_the_rows_defaults(rows: Path, tmp_path: Path) -> None:
    def run_settings(name: str, *options: object) -> dict[str, Any]:
        result = run("batch", rows, tmp_path / name, *options)
        assert result.exit_code == 0, result.stderr
        settings: dict[str, Any] = json.loads((tmp_path / name / "_manifest.json").read_text())["settings"]
        return settings

    options = ("--store", tmp_path / "store", "--tenant", "acme", "--part-rows", 7, "--model", "poet")
    options += ("--max-tokens", 9, "--temperature", 0.5, "--strategy", "fusion", "--k", 2, "--weights", "softmax")
    settings = run_settings("options", *options)
    assert (settings["store_uri"], settings["tenant"], settings["part_rows"]) == (str(tmp_path / "store"), "acme", 7)
    assert settings["defaults"] == {"model": "poet", "max_tokens": 9, "temperature": 0.5}
    retrieval = settings["retrieval"]
    assert (retrieval["strategy"], retrieval["k"], retrieval["weights"]) == ("fusion", 2, "softmax")
    file = tmp_path / "settings.yaml"
    file.write_text(f"store_uri: {tmp_path / 'store'}\nretrieval: {{k: 5}}\n")
    settings = run_settings("file", "--config", file)
    assert (settings["defaults"], settings["tenant"], settings["retrieval"]["k"]) == ({}, "local", 5)


@pytest.mark.parametrize(
    ("option", "value", "code"),
    [("--k", 0, 1), ("--strategy", "best", 2), ("--weights", "equal", 2), ("--option", "width=1", 1)],
)
def test_a_bad_value_is_refused_by_name_and_nothing_is_written(
    option: str, value: object, code: int, rows: Path, tmp_path: Path
) -> None:
    result = run("batch", rows, tmp_path / "out", "--store", tmp_path / "store", option, value)
    assert result.exit_code == code
    setting = {"--k": "retrieval.k", "--option": "strategy 'mixture' has no option 'width'; it has none"}
    named = setting[option] if code == 1 else f"'{option}'"
    assert named in words(result.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", ["base_model: /nosuch/model", "models: [{}, {base_model: /nosuch/model}]"])
def test_a_missing_base_model_is_refused_unless_a_cluster_has_it(given: str, rows: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"store_uri: {tmp_path / 'store'}\n{given}\n")
    result = run("batch", rows, tmp_path / "out", "--config", file)
    assert result.exit_code == 1
    assert "base_model: /nosuch/model: no such folder" in words(result.stderr)
    assert run("batch", rows, tmp_path / "out", "--config", file, "--address", "a-cluster:1").exit_code == 0


def test_a_place_without_a_pool_is_refused_and_none_begins_there(rows: Path, tmp_path: Path) -> None:
    result = run("batch", rows, tmp_path / "out", "--store", tmp_path / "misspelt")
    assert (result.exit_code, f"{tmp_path / 'misspelt'}: there is no pool" in words(result.stderr)) == (1, True)
    assert not (tmp_path / "misspelt").exists() and not (tmp_path / "out").exists()
