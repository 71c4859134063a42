from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from deployments.cli import cli
from deployments.server import free_port
from lora_store import ModuleWeights, Sample, write_peft_folder
from tests.deployments.app_fakes import BASE
from tests.deployments.test_server import listener


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(f"base_model: somewhere/{BASE}\nstore_uri: {tmp_path / 'pool'}\n")
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter the server would take."""
    path = tmp_path / "poet"
    weights = {"model.layers.0.mlp.up_proj": ModuleWeights(torch.ones(2, 6), torch.ones(8, 2), 2.0)}
    write_peft_folder(path, weights, base_model=BASE, samples=[Sample("Rhyme."), Sample("Sing.")])
    return path


def run(*arguments: object) -> Result:
    """The command's outcome; its error is its message, never a traceback."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], terminal_width=400)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


def words(text: str) -> str:
    return " ".join(text.split())


class Scripted(BaseHTTPRequestHandler):
    """Answers by (method, path) with (status, body), and keeps what it was sent."""

    answers: dict[tuple[str, str], tuple[int, str]]
    sent: list[Any]

    def do_GET(self) -> None:
        status, body = self.answers[self.command, self.path]
        length = int(self.headers.get("content-length") or 0)
        self.sent.append(json.loads(self.rfile.read(length)) if length else None)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Keeps the tests' output clean."""


@pytest.fixture
def script() -> Iterator[Callable[..., tuple[str, list[Any]]]]:
    """Start a server that gives one answer; its URL, and what it was sent."""
    servers = []

    def start(method: str, path: str, status: int, body: Any) -> tuple[str, list[Any]]:
        text = body if isinstance(body, str) else json.dumps(body)
        handler = type("Handler", (Scripted,), {"answers": {(method, path): (status, text)}, "sent": []})
        http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((http, thread))
        return f"http://127.0.0.1:{http.server_address[1]}", handler.sent

    yield start
    for http, thread in servers:
        http.shutdown()
        thread.join()
        http.server_close()


def events_of(*events: dict[str, Any], done: bool = True) -> str:
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + ("data: [DONE]\n\n" if done else "")


def delta(text: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}], **more}


def test_a_good_folder_is_fit_to_publish(folder: Path, config: Path) -> None:
    result = run("check", folder, "--config", config)
    assert result.exit_code == 0
    assert "poet: 1 modules, 2 samples, fit to publish" in words(result.stdout)


def test_every_reason_against_a_bad_folder_is_told(folder: Path, config: Path) -> None:
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
    assert "refused" in result.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("worker: {bank_rows: 3}", "bank_rows"),
        ("template: jinja", "template"),
        ("- a\n- list", "list"),
        ("worker: [unclosed", "line"),
    ],
)
def test_a_bad_config_is_told_and_nothing_starts(tmp_path: Path, folder: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    for command in (("check", folder), ("serve",)):
        result = run(*command, "--config", file)
        assert result.exit_code == 1
        assert said in result.stderr


def test_a_missing_config_is_told(tmp_path: Path, folder: Path) -> None:
    result = run("check", folder, "--config", tmp_path / "nowhere.yaml")
    assert result.exit_code == 1
    assert "nowhere.yaml" in words(result.stderr).replace(" ", "")


def test_serve_says_that_its_port_is_in_use(config: Path) -> None:
    with listener() as port:
        result = run("serve", "--config", config, "--port", port)
    assert result.exit_code == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in words(result.stderr)


def test_serve_names_a_preloaded_folder_that_holds_no_adapter(config: Path, tmp_path: Path) -> None:
    with listener() as port:
        result = run("serve", "--config", config, "--port", port, "--preload", tmp_path / "typo")
    assert result.exit_code == 1
    assert "typo" in result.stderr


@pytest.mark.parametrize("command", [("ask", "Hi"), ("route", "Hi"), ("list",), ("publish", ".")])
def test_no_server_at_the_url_is_told(command: tuple[str, ...]) -> None:
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    result = run(*command, "--url", url)
    assert result.exit_code == 1
    assert f"no server answers at {url}" in words(result.stderr)


def test_ask_prints_the_text_as_it_comes_and_the_adapters(script: Callable[..., tuple[str, list[Any]]]) -> None:
    lora = {"strategy": "mixture", "adapters": [{"name": "poet", "weight": 0.5}, {"name": "coder", "weight": 0.5}]}
    body = events_of(delta("", lora=lora), delta("Hel"), delta("lo [b]"), {"choices": []})
    url, sent = script("POST", "/v1/chat/completions", 200, body)
    result = run("ask", "Hi", "--url", url, "--model", "poet", "--max-tokens", 7)
    assert result.exit_code == 0
    assert result.stdout == "Hello [b]\n"
    assert words(result.stderr) == "mixture: poet × 0.50, coder × 0.50"
    assert [(s["model"], s["max_tokens"], s["temperature"], s["stream"]) for s in sent] == [("poet", 7, 0.0, True)]
    assert sent[0]["messages"] == [{"role": "user", "content": "Hi"}]


def test_ask_fails_with_the_streams_error(script: Callable[..., tuple[str, list[Any]]]) -> None:
    lora = {"strategy": "base", "adapters": []}
    body = events_of(delta("", lora=lora), {"error": {"message": "it stopped"}}, done=False)
    url, _ = script("POST", "/v1/chat/completions", 200, body)
    result = run("ask", "Hi", "--url", url)
    assert result.exit_code == 1
    assert "it stopped" in result.stderr


@pytest.mark.parametrize(
    ("body", "said"),
    [({"error": {"message": "no such model"}}, "no such model"), ("<html>", "the server answered 404")],
)
def test_a_refusal_is_told_in_the_servers_words(
    script: Callable[..., tuple[str, list[Any]]], body: Any, said: str
) -> None:
    url, _ = script("POST", "/v1/chat/completions", 404, body)
    result = run("ask", "Hi", "--url", url)
    assert result.exit_code == 1
    assert said in result.stderr


def test_route_shows_candidates_and_the_weights_of_those_that_answer(
    script: Callable[..., tuple[str, list[Any]]],
) -> None:
    plan = {
        "strategy": "selection",
        "generation": 4,
        "adapters": [{"name": "poet", "weight": 1.0}],
        "candidates": [{"name": "poet", "score": 0.75}, {"name": "coder", "score": 0.5}],
    }
    url, sent = script("POST", "/v1/route", 200, {"data": [plan]})
    result = run("route", "Hi", "--url", url)
    assert sent == [{"prompt": "Hi"}]
    rows = [line for line in result.stdout.splitlines() if "poet" in line or "coder" in line]
    assert ["1.000" in row for row in rows] == [True, False]
    assert ["0.750" in rows[0], "0.500" in rows[1]] == [True, True]


def test_list_shows_the_pool(script: Callable[..., tuple[str, list[Any]]]) -> None:
    row = {"name": "poet", "digest": "d" * 64, "ranks": [2, 4], "num_bytes": 9, "num_samples": 0}
    url, _ = script("GET", "/v1/loras", 200, {"generation": 4, "data": [row | {"found_by_auto": False}]})
    result = run("list", "--url", url)
    assert result.exit_code == 0
    assert "generation 4" in result.stdout
    [line] = [line for line in result.stdout.splitlines() if "poet" in line]
    assert "2, 4" in line
    assert "by name only" in line


def test_publish_sends_the_whole_path_and_tells_the_generation(
    script: Callable[..., tuple[str, list[Any]]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    url, sent = script("POST", "/v1/loras", 201, {"name": "poet", "generation": 4, "found_by_auto": False})
    result = run("publish", folder.name, "--url", url)
    assert result.exit_code == 0
    assert sent == [{"path": str(folder)}]
    assert "poet is live at generation 4 (no samples: by name only)" in words(result.stdout)


def test_publish_goes_on_after_a_refusal_and_fails_at_the_end(
    script: Callable[..., tuple[str, list[Any]]], folder: Path
) -> None:
    url, sent = script("POST", "/v1/loras", 400, {"error": {"message": "adapter 'poet' refused: it is bad"}})
    result = run("publish", folder, folder, "--url", url)
    assert result.exit_code == 1
    assert len(sent) == 2
    assert words(result.stderr).count("it is bad") == 2
