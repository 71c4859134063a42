from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.cli import run_server
from lora_store import ModuleWeights, Sample, write_peft_folder
from tests.deployments.adapter_records import BASE
from tests.deployments.listening import listener
from tests.deployments.scripted import run, scripted, words


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


def events_of(*events: dict[str, Any], done: bool = True) -> str:
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + ("data: [DONE]\n\n" if done else "")


def delta(text: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}], **more}


def test_a_good_folder_is_fit_to_publish(folder: Path, config: Path) -> None:
    result = run("check", folder, "--config", config)
    assert result.exit_code == 0
    assert "poet: 1 modules, 2 samples, fit to publish" in words(result.stdout)


def test_every_reason_against_a_bad_folder_is_printed(folder: Path, config: Path) -> None:
    (folder / "lora_samples.jsonl").write_text("[]\n")
    (folder / "adapter_config.json").write_text(
        (folder / "adapter_config.json").read_text().replace(BASE, "another-base")
    )
    result = run("check", folder, "--config", config)
    assert result.exit_code == 1
    reasons = words(result.stderr).split("refused: ")[1:]
    assert len(reasons) == 2
    assert any("another-base" in reason for reason in reasons)
    assert any("lora_samples.jsonl" in reason for reason in reasons)


def test_a_missing_folder_is_refused(tmp_path: Path, config: Path) -> None:
    result = run("check", tmp_path / "nowhere", "--config", config)
    assert result.exit_code == 1
    assert words(result.stderr).endswith("nowhere: no such folder")


def test_a_file_or_a_folder_of_adapters_is_refused_with_the_folder_to_give(folder: Path, config: Path) -> None:
    result = run("check", folder / "adapter_config.json", "--config", config)
    assert "is a file; give the folder that contains it" in words(result.stderr)
    result = run("check", folder.parent, "--config", config)
    assert words(result.stderr).endswith("adapter_config.json is missing; found adapters in poet")


@pytest.mark.parametrize(
    ("count", "hint"),
    [(0, "auto cannot find it"), (1, "1 sample, fit"), (2, "more reliably with 20"), (20, "to publish")],
)
def test_check_says_how_well_auto_can_find_the_adapter(folder: Path, config: Path, count: int, hint: str) -> None:
    lines = [json.dumps({"input": f"Verse {number}."}) for number in range(count)]
    (folder / "lora_samples.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if not count:
        (folder / "lora_samples.jsonl").unlink()
    result = run("check", folder, "--config", config)
    assert result.exit_code == 0, result.stderr
    assert hint in words(result.stdout)


def test_the_version_is_printed() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"loraretriever {importlib.metadata.version('loraretriever')}\n")


def test_shells_get_completion() -> None:
    assert "--install-completion" in run("--help").stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("worker: {bank_rows: 3}", "bank_rows"),
        ("template: jinja", "template"),
        ("- a\n- list", "list"),
        ("worker: [unclosed", "line"),
    ],
)
def test_a_bad_config_is_reported_and_nothing_starts(tmp_path: Path, folder: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    for command in (("check", folder), ("serve",)):
        result = run(*command, "--config", file)
        assert result.exit_code == 1
        assert said in result.stderr


def test_a_missing_config_is_reported(tmp_path: Path, folder: Path) -> None:
    result = run("check", folder, "--config", tmp_path / "nowhere.yaml")
    assert result.exit_code == 1
    assert "nowhere.yaml" in words(result.stderr).replace(" ", "")


def test_serve_says_that_its_port_is_in_use(config: Path) -> None:
    with listener() as port:
        result = run("serve", "--config", config, "--port", port)
    assert result.exit_code == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in words(result.stderr)
    assert "--port 0 uses a free port" in words(result.stderr)


def test_serve_names_a_preloaded_folder_that_holds_no_adapter(config: Path, tmp_path: Path) -> None:
    with listener() as port:
        result = run("serve", "--config", config, "--port", port, "--preload", tmp_path / "typo")
    assert result.exit_code == 1
    assert "typo" in result.stderr


def test_ask_streams_the_text_and_prints_the_adapters() -> None:
    lora = {"strategy": "mixture", "adapters": [{"name": "poet", "weight": 0.5}, {"name": "coder", "weight": 0.5}]}
    body = events_of(delta("", lora=lora), delta("Hel"), delta("lo [b]"), {"choices": []})
    with scripted((200, body)) as server:
        result = run("ask", "Hi", "there", "--url", server.url, "--model", "poet", "--max-tokens", 7)
    assert server.asked == [("POST", "/v1/chat/completions")]
    assert result.exit_code == 0
    assert result.stdout == "Hello [b]\n"
    assert words(result.stderr) == "mixture: poet × 0.50, coder × 0.50"
    assert [(s["model"], s["max_tokens"], s["temperature"], s["stream"]) for s in server.sent] == [
        ("poet", 7, 0.0, True)
    ]
    assert server.sent[0]["messages"] == [{"role": "user", "content": "Hi there"}]


def test_ask_reads_the_prompt_from_standard_input() -> None:
    lora = {"strategy": "base", "adapters": []}
    with scripted((200, events_of(delta("", lora=lora), delta("Hello")))) as server:
        result = run("ask", "-", "--url", server.url, input="two\nlines\n")
    assert (result.exit_code, result.stdout) == (0, "Hello\n")
    assert server.sent[0]["messages"] == [{"role": "user", "content": "two\nlines"}]


def test_ask_and_route_pass_on_how_readily_to_abstain() -> None:
    lora = {"strategy": "base", "adapters": []}
    plan = lora | {"generation": 1, "candidates": []}
    with scripted((200, events_of(delta("", lora=lora))), (200, {"data": [plan]})) as server:
        assert run("ask", "Hi", "--abstain", "never", "--url", server.url).exit_code == 0
        assert run("route", "Hi", "--abstain", "strict", "--url", server.url).exit_code == 0
    assert [sent["lora"] for sent in server.sent] == [{"abstain": "never"}, {"explain": True, "abstain": "strict"}]


def test_ask_fails_with_the_streams_error() -> None:
    lora = {"strategy": "base", "adapters": []}
    body = events_of(delta("", lora=lora), {"error": {"message": "it stopped"}}, done=False)
    with scripted((200, body)) as server:
        result = run("ask", "Hi", "--url", server.url)
    assert result.exit_code == 1
    assert "it stopped" in result.stderr


SHOWN = [{"input": "Write\x1b a\n[poem].", "score": 0.5}]


def test_route_shows_candidates_and_the_weights_of_the_plan() -> None:
    plan = {
        "strategy": "selection",
        "generation": 4,
        "adapters": [{"name": "poet", "weight": 1.0}],
        "candidates": [
            {"name": "poet", "score": 0.75, "threshold": 0.625, "confidence": 0.5, "samples": SHOWN},
            {"name": "coder", "score": 0.5, "threshold": 0.875, "confidence": 0.0},
        ],
        "why": "poet fits: it scores 0.750 and needs 0.625.",
    }
    with scripted((200, {"data": [plan]})) as server:
        result = run("route", "Hi", "--url", server.url)
    assert (server.asked, server.sent) == ([("POST", "/v1/route")], [{"prompt": "Hi", "lora": {"explain": True}}])
    rows = [line for line in result.stdout.splitlines() if line.startswith(("│ poet", "│ coder"))]
    assert ["1.000" in row for row in rows] == [True, False]
    assert ["0.625" in rows[0], "0.875" in rows[1]] == [True, True]
    assert "needs 0.625" in result.stdout
    assert "sample of poet, 0.500: Write a [poem]." in words(result.stdout)
    assert ["0.750" in rows[0], "0.500" in rows[1]] == [True, True]


@pytest.mark.parametrize("parts", [[3e-6, 1e-6, 0.0], [3e-6, 2e-3, 0.0], [3e-6, float("nan"), 0.0]])
def test_parity_is_printed_for_each_strategy_and_fails_above_its_tolerance(
    parts: list[float], folder: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    differences = dict(zip(("selection", "mixture", "fusion"), parts, strict=True))
    monkeypatch.setattr(run_server, "parity_with_peft", lambda *_: differences)  # typer calls by name only
    result = run("check", folder, "--config", config, "--parity")
    assert "at most 0.001" in words(result.stdout)
    assert all(strategy in result.stdout for strategy in differences)
    apart = not parts[1] < 1e-3
    assert result.exit_code == apart
    assert ("mixture differ from PEFT" in result.stderr) is apart


def test_the_commands_start_without_the_servers_packages() -> None:
    heavy = ("torch", "ray", "numpy", "pyarrow", "fastapi", "pydantic", "transformers", "lora_store")
    script = f"import sys, deployments.cli.main; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
