"""The lines that a start prints about access and ports."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import ray
import typer

from deployments.api.pool_responses import unserved_objects
from deployments.cli.local_server import Server
from deployments.cli.run_server import (
    access_note,
    find_program,
    next_steps,
    ports_note,
    run_server,
    start_problems,
    template_note,
)
from deployments.config.app import AppConfig
from deployments.json_types import JsonObject
from lora_store import LoraStore


@pytest.mark.parametrize(
    ("settings", "host", "says"),
    [
        ({}, "127.0.0.1", "HTTP on loopback only, no keys: any local process may send requests and publish"),
        ({}, "::1", "HTTP on loopback only, no keys: any local process may send requests and publish"),
        ({}, "::ffff:127.0.0.1", "HTTP on loopback only, no keys: any local process may send requests and publish"),
        ({}, "127.0.0.2", "HTTP on loopback only, no keys: any local process may send requests and publish"),
        ({}, "0.0.0.0", "no keys: anyone who reaches 0.0.0.0 may send requests; only this machine may publish"),
        (
            {"allow_remote_publish": True},
            "0.0.0.0",
            "no keys: anyone who reaches 0.0.0.0 may send requests and publish",
        ),
        ({"keys_file": Path("/k.yaml")}, "0.0.0.0", "keys from /k.yaml: every request needs one"),
        ({"api_key": "secret-key"}, "0.0.0.0", "one API key, from the settings: every request needs it"),
        ({"keys_file": Path("/k.yaml")}, "127.0.0.1", "keys from /k.yaml: every request needs one"),
    ],
)
def test_the_start_prints_who_has_access(settings: dict[str, Any], host: str, says: str) -> None:
    assert access_note(host, AppConfig(**settings)) == says


def test_the_start_says_which_template_chats_use(tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages }}")
    assert template_note(AppConfig().served_model) == "chats use the Alpaca prompt template"
    assert template_note(AppConfig(template="chat").served_model) == "chats use the base model's own chat template"
    assert template_note(AppConfig(base_model="far/away").served_model).endswith("or Alpaca's if it has none")
    assert template_note(AppConfig(base_model="far/away", chat_template=own).served_model) == f"chats use {own}"


def test_the_start_prints_the_other_ports_and_their_protection(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    says = ports_note(allows_unauthenticated=False)
    assert says.startswith("Ray also listens on all interfaces")
    assert "protected by Ray's token in ~/.ray/auth_token" in says and "metrics without protection" in says
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/run/token")
    assert "protected by Ray's token in /run/token" in ports_note(allows_unauthenticated=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    assert "protected by Ray's token in the variable RAY_AUTH_TOKEN" in ports_note(allows_unauthenticated=False)
    says = ports_note(allows_unauthenticated=True)
    assert "run code as this server" in says and "auth_token" not in says


@pytest.mark.parametrize("content", [None, "keys: 1"])
def test_an_unusable_keys_file_stops_the_start(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys.yaml"
    if content is not None:
        keys.write_text(content)
    with pytest.raises(typer.Exit):
        run_server(AppConfig(keys_file=keys), "127.0.0.1", 0)
    assert "keys.yaml" in "".join(capsys.readouterr().err.split())


class QuickServer(Server):
    """A server that only reports the phases of its start, and is interrupted at once."""

    def prepare(self, report: Callable[[str], None]) -> None:
        report("starting Ray and the deployments")

    def start(self, report: Callable[[str], None] = lambda _: None) -> str:
        report("loading the base model")
        return self.url

    def wait_ready(self, *, timeout_s: float) -> JsonObject:
        return {}

    def started(self) -> JsonObject:
        return {"num_adapters": 0, "refused": {}, "unserved": []}

    def interrupts(self) -> SimpleQueue[int]:
        received = SimpleQueue[int]()
        received.put(2)
        return received

    def finish_requests(self) -> bool:
        return True


@pytest.mark.parametrize("has_preload", [False, True])
def test_a_start_without_a_terminal_prints_each_phase_and_how_many_adapters_it_may_see(
    has_preload: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("deployments.cli.run_server.Server", QuickServer)
    (tmp_path / "adapter_config.json").touch()
    settings = AppConfig(preload=(tmp_path,)) if has_preload else AppConfig(api_key="secret-key")
    run_server(settings, "127.0.0.1", 8000)
    phases = ["starting Ray and the deployments", "loading the base model", "publishing the preloaded adapters"]
    counted = "0 adapters" if has_preload else "0 public adapters"
    expected = [*phases[: 2 + has_preload], f"ready after 0 s at http://127.0.0.1:8000 with {counted}"]
    assert capsys.readouterr().out.splitlines()[: len(expected)] == expected


class InterruptedServer(QuickServer):
    """A server whose start is interrupted."""

    def start(self, report: Callable[[str], None] = lambda _: None) -> str:
        signal.raise_signal(signal.SIGTERM)
        return self.url


def test_a_start_that_a_signal_ends_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("deployments.cli.run_server.Server", InterruptedServer)
    with pytest.raises(SystemExit) as caught:
        run_server(AppConfig(), "127.0.0.1", 8000)
    assert caught.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().out.splitlines()[-1] == "stopped before the server was ready"


def test_the_start_says_which_adapters_are_not_served() -> None:
    unserved = unserved_objects((("org/old", 12), ("org/older", 1)))
    assert start_problems({"unserved": unserved, "refused": {"/adapters/bad": "it is bad"}}) == [
        "12 adapters were made for org/old and are not served: start the server with base_model: org/old, or add the"
        " name to accepts_base if it means the same weights",
        "1 adapter was made for org/older and is not served: start the server with base_model: org/older, or add the"
        " name to accepts_base if it means the same weights",
        "not published: /adapters/bad: it is bad",
    ]


def test_the_start_ends_with_next_steps_and_where_ray_and_the_logs_are() -> None:
    ray, logs = "127.0.0.1:43210", Path("/tmp/session_1/logs/serve")
    assert next_steps("http://127.0.0.1:8000", ray, logs) == [
        "console:  http://127.0.0.1:8000",
        'ask:      loraretriever ask "a prompt"',
        "publish:  loraretriever publish FOLDER",
        "Ray:      127.0.0.1:43210",
        "logs:     /tmp/session_1/logs/serve",
    ]
    elsewhere = next_steps("http://127.0.0.1:9000", ray, logs, has_keys=True)
    assert elsewhere[1] == 'ask:      LORARETRIEVER_KEY=KEY loraretriever ask "a prompt" --url http://127.0.0.1:9000'
    assert next_steps("http://127.0.0.1:8000", ray, logs, "bin/lora")[2] == "publish:  bin/lora publish FOLDER"


def test_a_program_that_is_not_on_the_path_is_called_by_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "loraretriever"
    file.touch(mode=0o755)
    monkeypatch.setenv("PATH", "")
    assert find_program(str(file)) == str(file)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_program(str(file)) == "loraretriever"


def test_a_quiet_start_keeps_rays_reports_to_itself() -> None:
    server = Server(AppConfig(), port=1, is_verbose=False)
    assert server.ray_log_level == logging.ERROR
    assert Server(AppConfig(), port=1).ray_log_level == logging.INFO


def test_a_damaged_pool_stops_the_start_before_ray_with_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = tmp_path / "pool"
    LoraStore(str(pool), accepts_base=["far/away"])
    commit = pool / "catalogue" / "_delta_log" / f"{0:020}.json"
    commit.write_bytes(commit.read_bytes()[:50])
    with pytest.raises(typer.Exit):
        run_server(AppConfig(store_uri=str(pool), base_model="far/away"), "127.0.0.1", 0)
    printed = "".join(capsys.readouterr().err.split())
    assert printed.startswith(f"store_uri:thepool{pool}cannotbeopened:")
    assert str(commit) in printed and "loraretrieverpoolrepair" in printed
    assert not ray.is_initialized()
