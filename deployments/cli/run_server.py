"""Run `loraretriever serve`."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from deployments.addresses import is_loopback_host
from deployments.auth.key_file import load_keys
from deployments.auth.ray_token import describe_token
from deployments.cli.check_adapter import folder_problem
from deployments.cli.client import ServerFailed
from deployments.cli.local_server import Server
from deployments.cli.options import DEFAULT_URL, KEY_VARIABLE
from deployments.cli.output import counted, fail, out, say, show_error
from deployments.config.app import AppConfig
from deployments.config.served_model import ServedModel
from deployments.errors import ProxyUnsafe
from deployments.json_types import JsonObject
from deployments.publishing.adapter_folders import adapter_folders
from lora_store import LoraStoreError

_READY_TIMEOUT_S = 600.0


def run_server(
    settings: AppConfig, host: str, port: int, metrics_port: int | None = None, *, is_verbose: bool = False
) -> None:
    """Run the server until interrupted. If it cannot start, print why and exit."""
    level = logging.INFO if is_verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # polls of /ready are not worth a line
    try:
        for path in settings.preload:
            if not adapter_folders(path):
                fail(f"preload: {folder_problem(path)}")
        load_keys(settings.api_key, settings.keys_file)  # an unusable keys file stops the start here
        server = Server(settings, host=host, port=port, metrics_port=metrics_port, is_verbose=is_verbose)
        started = time.monotonic()
        with server:
            server.leave_on_signals()
            with out.status("starting") as status:
                report: Callable[[str], None] = status.update if out.is_terminal else say  # a line for a log file
                server.prepare(report)
                url = server.start(report)
                if settings.preload:
                    report("publishing the preloaded adapters")
                server.wait_ready(timeout_s=_READY_TIMEOUT_S)
                ready = server.started()
            interrupts = server.interrupts()
            # With keys the start may only see what all tenants may use.
            usable = counted(ready["num_adapters"], "public adapter" if settings.has_keys else "adapter")
            out.print(f"ready after {time.monotonic() - started:.0f} s at {url} with {usable}")
            problems, access = start_problems(ready), access_note(host, settings)
            ports = ports_note(allows_unauthenticated=settings.allow_unauthenticated_ray)
            program = find_program(sys.argv[0])
            steps = next_steps(url, server.ray_address, server.logs, program, has_keys=settings.has_keys)
            notes = [(model.name, template_note(model)) for model in settings.served_models.models]
            if server.has_new_pool:
                say(f"created a new pool at {settings.store_uri}")
            for problem in problems:
                show_error(problem)
            for name, note in notes:
                say(f"{name}: {note}" if settings.models else note)
            for line in (access, ports, *steps):
                say(line)
            interrupts.get()
            if not server.finish_requests():
                out.print("stopped before all requests were answered")
    except SystemExit:  # by a signal
        say("stopped before the server was ready")
        raise
    except (ServerFailed, ProxyUnsafe, LoraStoreError, ValueError, OSError) as exc:
        fail(exc)


def start_problems(ready: JsonObject) -> list[str]:
    """Return a line for each base model whose adapters are not served, and for each adapter that was not published."""
    refused = [f"not published: {path}: {reason}" for path, reason in ready["refused"].items()]
    return [row["text"] for row in ready["unserved"]] + refused


def next_steps(
    url: str, ray_address: str, logs: Path, program: str = "loraretriever", *, has_keys: bool = False
) -> list[str]:
    """Return what to do with a server that just started. `program`: how to call this one."""
    options = "" if url == DEFAULT_URL else f" --url {url}"
    command = f"{KEY_VARIABLE}=KEY {program}" if has_keys else program
    return [
        f"console:  {url}",
        f'ask:      {command} ask "a prompt"{options}',
        f"publish:  {command} publish FOLDER{options}",
        f"Ray:      {ray_address}",
        f"logs:     {logs}",
    ]


def find_program(file: str) -> str:
    """Return how a shell in this folder calls the program: by its name if it is on the path, else by its file."""
    name = Path(file).name
    return name if shutil.which(name) else file


def template_note(model: ServedModel) -> str:
    """Say which prompt template chats use."""
    if model.template_in_use == "alpaca":
        return "chats use the Alpaca prompt template"
    if model.template_in_use == "auto":
        return "chats use the base model's own chat template, or Alpaca's if it has none"
    source = "the base model's own chat template" if model.chat_template is None else str(model.chat_template)
    return f"chats use {source}"


def access_note(host: str, settings: AppConfig) -> str:
    """Say who may send requests and publish."""
    if settings.keys_file is not None:
        return f"keys from {settings.keys_file}: every request needs one"
    if settings.has_keys:
        return "one API key, from the settings: every request needs it"
    if is_loopback_host(host):
        return "HTTP on loopback only, no keys: any local process may send requests and publish"
    publishing = " and publish" if settings.allow_remote_publish else "; only this machine may publish"
    return f"no keys: anyone who reaches {host} may send requests{publishing}"


def ports_note(*, allows_unauthenticated: bool) -> str:
    """Describe the ports that listen besides HTTP."""
    guard = f"protected by Ray's token {describe_token(os.environ)}"
    if allows_unauthenticated:
        guard = "unprotected because of allow_unauthenticated_ray: anyone who reaches them may run code as this server"
    return (
        f"Ray also listens on all interfaces: gRPC on random ports, {guard}, and metrics without protection. "
        "Block these ports for other machines with a firewall"
    )
