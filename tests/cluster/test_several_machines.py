"""The commands of docs/how-to/several-machines.md, with this machine's addresses in place of the page's."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import click
import httpx
import psutil
import pytest
import yaml
from ray.scripts.scripts import cli as ray_cli
from ray.serve.schema import ServeDeploySchema
from ray.serve.scripts import cli as serve_cli

from deployments.calls.h11_proxy import CALLBACK, CALLBACK_VARIABLE
from deployments.cli.client import free_port
from deployments.cli.local_server import CHEAPER_SERVE, ENDS_AT_ONCE
from deployments.config.app import AppConfig
from tests.cluster.conftest import filled_cache
from tests.cluster.machines import own_ray
from tests.e2e.live import command_of, eventually, eventually_equal, is_ready
from tests.served_engine import START_S, WORKER, save_served_model
from tests.soak import Scale

PAGE = (Path(__file__).parent.parent.parent / "docs" / "how-to" / "several-machines.md").read_text()
LINES = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
VARIABLES = dict(line.removeprefix("export ").split("=", 1) for line in LINES if line.startswith("export "))
COMMANDS = [shlex.split(line) for line in LINES if not line.startswith("export ")]
YAML, DEPLOYMENTS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
HEADS_VARIABLES = ("RAY_REDIS_ADDRESS", "RAY_external_storage_namespace")
HEAD, NODE, OTHER_NODE = "127.0.0.2", "127.0.0.3", "127.0.0.4"
DRAIN_VARIABLE = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
NUM_CLIENTS = 4
PASSWORD = "password-of-redis"
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
    retrieval, sampling = settings.retrieval.changed(ingress.user_config)
    assert (retrieval.k, sampling) == (5, {"temperature": 0})


def test_the_page_names_the_variables_that_serve_sets() -> None:
    ours = CHEAPER_SERVE | ENDS_AT_ONCE | {CALLBACK_VARIABLE: CALLBACK}
    assert {name: VARIABLES[name] for name in ours} == ours


class Site:
    """The page's commands with the addresses of this machine, and its file with a tiny model."""

    def __init__(self, tiny_folders: Mapping[str, Path], folder: Path) -> None:
        port = free_port(HEAD)
        self.url = f"http://{HEAD}:{port}"
        config = page_config()
        config["http_options"] = {"host": HEAD, "port": port}  # the proxies of both nodes share the port
        config["applications"][0]["args"] = {
            "base_model": str(save_served_model(tiny_folders, folder / "model")),
            "base_model_name": "tiny",
            "store_uri": str(folder / "pool"),
            "cache_dir": str(filled_cache(folder / "cache")),
            "worker": WORKER,
            "allowed_hosts": [HEAD],
        }
        file = folder / "serve.yaml"
        file.write_text(yaml.safe_dump(config))
        ports = {"6379": str(free_port(HEAD)), "8265": str(free_port(HEAD))}
        self._here = {"10.0.0.1": HEAD, "10.0.0.2": NODE, "serve.yaml": str(file), **ports}
        agent = ("--dashboard-agent-listen-port", "0")  # two agents of one machine cannot have the same port
        client = ("--ray-client-server-port", str(free_port(HEAD)), "--dashboard-port", "8265")
        _, head, node, deploy, status = COMMANDS
        self.head, self.node = self._replaced(*head, *agent, *client), self._replaced(*node, *agent)
        self.deploy, self.status = self._replaced(*deploy), self._replaced(*status)

    def _replaced(self, *command: str) -> list[str]:
        text = shlex.join(command)
        for old, new in self._here.items():
            text = text.replace(old, new)
        program, *arguments = shlex.split(text)
        return [str(Path(sys.executable).with_name(program)), *arguments]

    def start_application(self) -> None:
        """Run the page's `serve deploy`. Return when the application is ready."""
        run = subprocess.run(self.deploy, capture_output=True, text=True, timeout=START_S, check=False)
        assert run.returncode == 0, run.stderr
        eventually(lambda: is_ready(self.url), within_s=START_S)

    def is_ready_on_both(self) -> bool:
        """Return whether both nodes' proxies, which share the port, find a ready Ingress."""
        return all(is_ready(self.url) for _ in range(20))

    def check_answer(self) -> None:
        body = {"model": "tiny", "prompt": "The sea", "max_tokens": 4}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4, answer.text

    def other_node(self) -> list[str]:
        """Return the command that starts Ray on one more machine."""
        return [part.replace(NODE, OTHER_NODE) for part in self.node]

    def ask_until(self, is_over: Event) -> Iterator[str]:
        """Stream answers until then, and yield how each ended: "" if it is whole.

        A connection that breaks before the answer is made again, as a load balancer does.
        """
        body = {"model": "tiny", "prompt": "The sea", "max_tokens": 300, "ignore_eos": True, "stream": True}
        while not is_over.is_set():
            text, has_begun = "", False
            try:
                with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=START_S) as answer:
                    has_begun = True
                    text = answer.read().decode()
            except httpx.TransportError as exc:
                text = f"{exc!r} after {text!r}"
                if not has_begun:
                    continue
            yield "" if text.endswith("data: [DONE]\n\n") else text[-500:]

    def application_status(self) -> str:
        """Return what `serve status` says, empty where it fails."""
        run = subprocess.run(self.status, capture_output=True, text=True, timeout=END_S, check=False)
        found = yaml.safe_load(run.stdout) if run.returncode == 0 else {}
        return str(found.get("applications", {}).get("loraretriever", {}).get("status", ""))


@pytest.fixture
def site(
    tiny_folders: Mapping[str, Path], tmp_path: Path, scale: Scale, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    """Yield the site, with the page's variables set and a separate folder for Ray."""
    if not scale.is_full:
        pytest.skip("another cluster starts: in make soak")
    for name, value in VARIABLES.items():
        if name not in HEADS_VARIABLES:
            monkeypatch.setenv(name, value)
    with own_ray():
        yield Site(tiny_folders, tmp_path)


def test_the_pages_commands_start_an_application_on_two_nodes(site: Site) -> None:
    with running(site.head):
        eventually(lambda: answers(site.status), within_s=START_S)
        with running(site.node):
            site.start_application()
            site.check_answer()
            assert site.application_status() == "RUNNING"


def test_a_machine_that_is_told_to_stop_gives_its_replicas_away_and_loses_no_answer(site: Site, scale: Scale) -> None:
    is_over = Event()
    with ThreadPoolExecutor(NUM_CLIENTS) as clients, ExitStack() as nodes:
        nodes.enter_context(running(site.head))
        eventually(lambda: answers(site.status), within_s=START_S)
        drained = nodes.enter_context(running(site.node, **{DRAIN_VARIABLE: VARIABLES[DRAIN_VARIABLE]}))
        site.start_application()
        other = nodes.enter_context(running(site.other_node()))
        nodes.callback(is_over.set)
        asking = [clients.submit(lambda: list(site.ask_until(is_over))) for _ in range(NUM_CLIENTS)]
        kinds = set(replicas(drained).values())
        assert len(kinds) == 4 and not replicas(other)
        time.sleep(5)
        drained.terminate()
        drained.wait(START_S)
        eventually(lambda: set(replicas(other).values()) == kinds)
        eventually(site.is_ready_on_both, within_s=START_S)
        time.sleep(5)
        is_over.set()
        ends = [end for each in asking for end in each.result(START_S)]
        scale.record("answers while a machine was drained", len(ends))
        assert [end for end in ends if end] == [] and len(ends) > NUM_CLIENTS


def test_replicas_outlive_the_head_and_a_new_head_with_redis_finds_them(site: Site, tmp_path: Path) -> None:
    with redis(tmp_path) as address, ExitStack() as nodes:
        variables = {name: VARIABLES[name] for name in HEADS_VARIABLES} | {"RAY_REDIS_ADDRESS": address}
        start_head = partial(running, [*site.head, "--redis-password", PASSWORD], **variables)
        head = nodes.enter_context(start_head())
        eventually(lambda: answers(site.status), within_s=START_S)
        node = nodes.enter_context(running(site.node))
        site.start_application()
        site.check_answer()
        before = replicas(node)
        assert len(before) >= 4

        for process in [head.pid, *(child.pid for child in psutil.Process(head.pid).children(recursive=True))]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        head.wait(END_S)
        assert not answers(site.status)
        for _ in range(20):
            site.check_answer()

        # Ray refuses a second head while any process of the machine has its address. Here the other node is one.
        (Path(os.environ["RAY_TMPDIR"]) / "ray" / "ray_current_cluster").unlink(missing_ok=True)
        nodes.enter_context(start_head())
        eventually_equal(site.application_status, "RUNNING", within_s=START_S)
        eventually(site.is_ready_on_both, within_s=START_S)
        site.check_answer()
        assert replicas(node) == before

        [worker] = [pid for pid, name in before.items() if name == "Worker"]
        os.kill(worker, signal.SIGKILL)
        eventually(lambda: set(replicas(node).values()) == set(before.values()) and worker not in replicas(node))
        eventually(site.is_ready_on_both, within_s=START_S)
        site.check_answer()


def replicas(node: subprocess.Popen[bytes]) -> dict[int, str]:
    """Return the processes of replicas on a node, with the names of their deployments."""
    commands = {child.pid: command_of(child) for child in psutil.Process(node.pid).children(recursive=True)}
    found = {pid: re.match(r"ray::ServeReplica:loraretriever:(\w+)", command) for pid, command in commands.items()}
    return {pid: match[1] for pid, match in found.items() if match is not None}


@contextmanager
def redis(folder: Path) -> Iterator[str]:
    """Run Redis as the page asks for it, and yield its address."""
    program, port = shutil.which("redis-server"), free_port("127.0.0.1")
    if program is None:
        pytest.skip("there is no redis-server: install Debian's package redis-server")
    options = {"bind": "127.0.0.1", "port": port, "requirepass": PASSWORD, "dir": folder}
    options |= {"appendonly": "yes", "appendfsync": "always"}
    command = [program, *[part for name, value in options.items() for part in (f"--{name}", str(value))]]
    with running(command):
        eventually(lambda: connects(port))
        yield f"127.0.0.1:{port}"


def connects(port: int) -> bool:
    with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@contextmanager
def running(command: list[str], **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command as a service. At the end ask it to stop, as systemd does, and kill what is left of its group."""
    environment = os.environ | {DRAIN_VARIABLE: "5"} | variables
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def answers(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, timeout=END_S, check=False).returncode == 0
