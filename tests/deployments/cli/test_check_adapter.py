from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deployments.cli import peft_parity
from gpu_worker.errors import BaseModelUnsupported
from lora_store import AdapterRefused, ModuleWeights, Sample, write_peft_folder
from tests.deployments.adapter_records import BASE
from tests.deployments.scripted import run, words


def test_a_good_folder_is_fit_to_publish(folder: Path, config: Path) -> None:
    result = run("publish", "--dry-run", folder, "--config", config)
    assert result.exit_code == 0
    assert "poet: 1 module, 2 samples, fit to publish" in words(result.stdout)


def test_a_base_that_is_named_replaces_the_folders(folder: Path, config: Path) -> None:
    named = (folder / "adapter_config.json").read_text().replace(BASE, "/home/me/base")
    (folder / "adapter_config.json").write_text(named)
    assert run("publish", "--dry-run", folder, "--config", config).exit_code == 1
    assert run("publish", "--dry-run", folder, "--config", config, "--base-name", BASE).exit_code == 0


def test_every_reason_against_a_bad_folder_is_printed(folder: Path, config: Path) -> None:
    (folder / "lora_samples.jsonl").write_text("[]\n")
    (folder / "adapter_config.json").write_text(
        (folder / "adapter_config.json").read_text().replace(BASE, "another-base")
    )
    result = run("publish", "--dry-run", folder, "--config", config)
    assert result.exit_code == 1
    reasons = words(result.stderr).split("refused: ")[1:]
    assert len(reasons) == 2
    assert any("another-base" in reason for reason in reasons)
    assert any("lora_samples.jsonl" in reason for reason in reasons)


def test_a_missing_folder_is_refused(tmp_path: Path, config: Path) -> None:
    result = run("publish", "--dry-run", tmp_path / "nowhere", "--config", config)
    assert result.exit_code == 1
    assert words(result.stderr).endswith("nowhere: no such folder")


def test_a_file_and_a_folder_without_adapters_are_refused(folder: Path, tmp_path: Path, config: Path) -> None:
    result = run("publish", "--dry-run", folder / "adapter_config.json", "--config", config)
    assert "is a file; give the folder that contains it" in words(result.stderr)
    (tmp_path / "empty").mkdir()
    result = run("publish", "--dry-run", tmp_path / "empty", "--config", config)
    assert words(result.stderr).endswith("no adapter here, adapter_config.json is missing")


def test_the_last_checkpoint_of_a_run_is_checked_under_the_name_of_the_run(
    folder: Path, tmp_path: Path, config: Path
) -> None:
    for step in (90, 100):
        shutil.copytree(folder, tmp_path / "my-task" / f"checkpoint-{step}")
    (tmp_path / "my-task" / "checkpoint-90" / "adapter_model.safetensors").unlink()
    result = run("publish", "--dry-run", tmp_path / "my-task", "--config", config)
    assert result.exit_code == 0, result.stderr
    assert words(result.stdout).startswith("my-task: 1 module, 2 samples, fit to publish")


def test_each_adapter_of_a_folder_is_checked_and_the_refused_are_counted(
    folder: Path, tmp_path: Path, config: Path
) -> None:
    for name in ("bard", "bad", "poet", "worse"):
        shutil.copytree(folder, tmp_path / "many" / name)
    for name in ("bad", "worse"):
        (tmp_path / "many" / name / "adapter_model.safetensors").unlink()
    result = run("publish", "--dry-run", tmp_path / "many", "--config", config)
    assert result.exit_code == 1
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == ["bard", "poet"]
    assert words(result.stderr).startswith("bad, worse: refused: adapter_model.safetensors: is missing")
    assert words(result.stderr).endswith("2 fit to publish, 2 refused")
    assert run("publish", "--dry-run", tmp_path / "many", "--config", config, "--parity").exit_code == 1
    rows = json.loads(run("publish", "--dry-run", tmp_path / "many", "--config", config, "--json").stdout)["data"]
    fit = [(row["name"], row["is_fit"]) for row in rows]
    assert fit == [("bad", False), ("bard", True), ("poet", True), ("worse", False)]


@pytest.mark.parametrize(
    ("count", "hint"),
    [
        (0, "auto cannot find it"),
        (1, "1 sample, fit"),
        (2, "more reliably with 20"),
        (20, "20 samples, fit to publish"),
        (300, "200 samples of 300, spread over the file, fit to publish"),
    ],
)
def test_a_dry_run_says_how_well_auto_can_find_the_adapter(folder: Path, config: Path, count: int, hint: str) -> None:
    lines = [json.dumps({"input": f"Verse {number}."}) for number in range(count)]
    (folder / "lora_samples.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if not count:
        (folder / "lora_samples.jsonl").unlink()
    result = run("publish", "--dry-run", folder, "--config", config)
    assert result.exit_code == 0, result.stderr
    assert hint in words(result.stdout)


@pytest.mark.parametrize("parts", [[3e-6, 1e-6, 0.0], [3e-6, 2e-3, 0.0], [3e-6, float("nan"), 0.0]])
def test_parity_is_printed_for_each_strategy_and_fails_above_its_tolerance(
    parts: list[float], folder: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    differences = dict(zip(("selection", "mixture", "fusion"), parts, strict=True))
    monkeypatch.setattr(peft_parity, "parity_with_peft", lambda *_: differences)  # typer calls by name only
    result = run("publish", "--dry-run", folder, "--config", config, "--parity")
    assert "at most 0.001" in words(result.stdout)
    assert all(strategy in result.stdout for strategy in differences)
    apart = not parts[1] < 1e-3
    assert result.exit_code == apart
    assert ("mixture differ from PEFT" in result.stderr) is apart


@pytest.mark.parametrize(
    "error", [AdapterRefused("poet", ["q_proj maps 8 to 9"]), BaseModelUnsupported("q_proj maps 8 to 9")]
)
def test_what_prevents_the_comparison_is_said_without_a_traceback(
    error: Exception, folder: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(peft_parity, "parity_with_peft", fail)
    result = run("publish", "--dry-run", folder, "--config", config, "--parity")
    assert result.exit_code == 1 and "q_proj maps 8 to 9" in words(result.stderr)


def test_a_dry_run_without_a_server_needs_no_ray_torch_and_transformers(folder: Path, config: Path) -> None:
    """Each of them takes seconds to import."""
    script = f"""
import sys
from deployments.cli.main import cli
cli(["publish", "--dry-run", {str(folder)!r}, "--config", {str(config)!r}], standalone_mode=False)
print({{"ray", "torch", "transformers", "fastapi", "huggingface_hub"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert "fit to publish" in words(done.stdout)
    assert done.stdout.strip().splitlines()[-1] == "set()"


def test_an_adapter_whose_b_are_all_zero_is_fit_with_a_warning(config: Path, tmp_path: Path) -> None:
    weights = {"model.layers.0.mlp.up_proj": ModuleWeights(torch.ones(2, 6), torch.zeros(8, 2), 2.0)}
    write_peft_folder(tmp_path / "poet", weights, base_model=BASE, samples=[Sample("Rhyme.")])
    result = run("publish", "--dry-run", tmp_path / "poet", "--config", config)
    assert (result.exit_code, "fit to publish" in result.stdout) == (0, True)
    assert "warning: poet: every lora_B is zero" in words(result.stderr)


def test_without_a_server_a_dry_run_checks_here_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, config: Path
) -> None:
    monkeypatch.setattr("deployments.cli.publish.answers", lambda url: False)
    result = run("publish", "--dry-run", folder)
    assert "no server answers at http://127.0.0.1:8000: checked without one" in words(result.stderr)
    assert result.exit_code == 1 and f"names '{BASE}'" in words(result.stderr), "another base than the packaged model"


def test_a_dry_run_at_a_given_address_needs_its_server_or_settings(
    folder: Path, monkeypatch: pytest.MonkeyPatch, config: Path
) -> None:
    monkeypatch.setattr("deployments.cli.publish.answers", lambda url: False)
    result = run("publish", "--dry-run", folder, "--url", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert "no server answers at http://127.0.0.1:1; start it, or add --config FILE" in words(result.stderr)
    assert run("publish", "--dry-run", folder, "--url", "http://127.0.0.1:1", "--config", config).exit_code == 0


def test_several_folders_are_checked_together(folder: Path, tmp_path: Path, config: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "bard")
    result = run("publish", "--dry-run", folder, other, "--config", config)
    assert words(result.stderr).endswith("2 fit to publish, 0 refused")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--config", "x.yaml"), "--config: needs --dry-run"),
        (("--parity",), "--parity: needs --dry-run"),
        (("--dry-run", "--config", "x.yaml"), "only a server can read s3://bucket/poet"),
    ],
)
def test_options_that_need_a_dry_run_or_a_server_are_usage_errors(options: tuple[str, ...], said: str) -> None:
    result = run("publish", "s3://bucket/poet", *options)
    assert result.exit_code == 2 and said in words(result.stderr)
