"""The commands of docs/how-to/several-machines.md, with this machine's addresses in place of the page's."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
import yaml
from ray.scripts.scripts import cli as ray_cli
from ray.serve.schema import ServeDeploySchema
from ray.serve.scripts import cli as serve_cli

from deployments.calls.h11_proxy import CALLBACK, CALLBACK_VARIABLE
from deployments.cli.client import free_port
from deployments.cli.local_server import CHEAPER_SERVE, ENDS_AT_ONCE
from deployments.config.app import AppConfig
from tests.cluster.machines import own_ray
from tests.e2e.live import eventually
from tests.served_engine import START_S, WORKER, save_served_model
from tests.soak import Scale

PAGE = (Path(__file__).parent.parent.parent / "docs" / "how-to" / "several-machines.md").read_text()
LINES = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
VARIABLES = dict(line.removeprefix("export ").split("=", 1) for line in LINES if line.startswith("export "))
COMMANDS = [shlex.split(line) for line in LINES if not line.startswith("export ")]
YAML, DEPLOYMENTS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
HEAD, NODE = "127.0.0.2", "127.0.0.3"
END_S = 120


def page_config() -> dict[str, Any]:
    """Return the page's file, with the part that changes defaults."""
    config: dict[str, Any] = yaml.safe_load(YAML + DEPLOYMENTS)
    return config


def test_rays_and_serves_commands_have_the_options_of_the_page() -> None:
    assert [command[:2] for command in COMMANDS] == [
        ["ray", "get-auth-token"],
        ["ray", "start"],
        ["ray", "start"],
        ["serve", "deploy"],
        ["serve", "status"],
    ]
    for program, name, *options in COMMANDS:
        group: Any = {"ray": ray_cli, "serve": serve_cli}[program]
        command = group.get_command(click.Context(group), name)
        given = [option.replace("serve.yaml", __file__) for option in options]
        command.make_context(name, given)  # fails on an unknown option


def test_the_file_of_the_page_is_one_that_serve_and_the_application_take() -> None:
    config = page_config()
    [application] = ServeDeploySchema.model_validate(config).applications
    settings = AppConfig.model_validate(application.args)
    scalings = (settings.ingress_scaling, settings.retriever_scaling, settings.store_scaling, settings.worker_scaling)
    assert {(scaling.min_replicas, scaling.root["max_replicas_per_node"]) for scaling in scalings} == {(2, 1)}
    [ingress] = application.deployments
    assert settings.retrieval.changed(ingress.user_config).k == 5


def test_the_page_names_the_variables_that_serve_sets() -> None:
    ours = CHEAPER_SERVE | ENDS_AT_ONCE | {CALLBACK_VARIABLE: CALLBACK}
    assert {name: VARIABLES[name] for name in ours} == ours


def test_the_pages_commands_start_an_application_on_two_nodes(
    tiny_folders: Mapping[str, Path], tmp_path: Path, scale: Scale, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not scale.is_full:
        pytest.skip("another cluster starts: in make soak")
    for name, value in VARIABLES.items():
        if not name.startswith(("RAY_REDIS", "RAY_external")):
            monkeypatch.setenv(name, value)
    config = page_config()
    config["proxy_location"] = "HeadOnly"  # two proxies of one machine cannot have the same port
    config["http_options"] = {"host": HEAD, "port": free_port(HEAD)}
    config["applications"][0]["args"] = {
        "base_model": str(save_served_model(tiny_folders, tmp_path / "model")),
        "base_model_name": "tiny",
        "store_uri": str(tmp_path / "pool"),
        "cache_dir": str(tmp_path / "cache"),
        "worker": WORKER,
        "allowed_hosts": [HEAD],
    }
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    ports = {"6379": str(free_port(HEAD)), "8265": str(free_port(HEAD))}

    def here(command: list[str], *more: str) -> list[str]:
        """Return the page's command with the addresses and the file of this test."""
        text = shlex.join([*command, *more])
        for old, new in {"10.0.0.1": HEAD, "10.0.0.2": NODE, "serve.yaml": str(file), **ports}.items():
            text = text.replace(old, new)
        program, *arguments = shlex.split(text)
        return [str(Path(sys.executable).with_name(program)), *arguments]

    _, head, node, deploy, status = COMMANDS
    agent = ("--dashboard-agent-listen-port", "0")  # two agents of one machine cannot have the same port
    client = ("--ray-client-server-port", str(free_port(HEAD)), "--dashboard-port", "8265")
    url = f"http://{HEAD}:{config['http_options']['port']}"
    with own_ray(), ExitStack() as nodes:
        nodes.enter_context(running(here(head, *agent, *client)))
        eventually(lambda: answers(here(status)), within_s=START_S)
        nodes.enter_context(running(here(node, *agent)))
        run = subprocess.run(here(deploy), capture_output=True, text=True, timeout=START_S, check=False)
        assert run.returncode == 0, run.stderr
        eventually(lambda: is_ready(url), within_s=START_S)
        body = {"model": "tiny", "prompt": "The sea", "max_tokens": 4}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4, answer.text
        shown = subprocess.run(here(status), capture_output=True, text=True, timeout=END_S, check=True).stdout
        assert yaml.safe_load(shown)["applications"]["loraretriever"]["status"] == "RUNNING"


@contextmanager
def running(command: list[str]) -> Iterator[None]:
    """Run `ray start --block`. At the end ask it to stop, as systemd does, and kill what is left of its group."""
    environment = os.environ | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "5"}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def answers(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, timeout=END_S, check=False).returncode == 0


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=30).status_code == 200
    except httpx.TransportError:
        return False
