"""The commands that run the project's own code on this machine: the server, and the check of a folder."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deployments.auth.authenticator import Authenticator
from deployments.cli.local_server import Server, ServerFailed
from deployments.cli.peft_parity import TOLERANCE, parity_with_peft
from deployments.config.app import AppConfig, load_config
from deployments.errors import ProxyUnsafe
from deployments.publishing.adapter_folders import adapter_folders
from lora_store import AdapterRefused, check_folder

_READY_TIMEOUT_S = 600.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

out = Console()
err = Console(stderr=True)


def run_server(config: Path | None, preload: list[Path], host: str, port: int, metrics_port: int | None = None) -> int:
    """Serve until interrupted; the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # waiting for /ready is no news
    try:
        settings = load_config(config, **({"preload": preload} if preload else {}))
        for path in settings.preload:
            if not adapter_folders(path):
                return _fail(f"{path} is no adapter folder and holds none")
        Authenticator(settings)  # a keys file that cannot be used stops the start here, with its reason
        _serve(Server(settings, host=host, port=port, metrics_port=metrics_port), settings, host)
    except (ServerFailed, ProxyUnsafe, ValueError, OSError) as exc:
        return _fail(str(exc))
    return 0


def check_adapter(folder: Path, config: Path | None, parity: bool) -> int:
    """Say whether the folder is fit to publish, or every reason why not; with `parity` also how near PEFT's logits are.

    The exit code.
    """
    try:
        settings = load_config(config)
        admitted = check_folder(folder.resolve(), accepts_base=settings.accepted_bases, module_shapes=None)
    except AdapterRefused as exc:
        return _fail("\n".join(f"refused: {reason}" for reason in exc.reasons))
    except (ValueError, OSError) as exc:
        return _fail(str(exc))
    name = folder.resolve().name
    out.print(f"{name}: {len(admitted.modules)} modules, {len(admitted.samples)} samples, fit to publish")
    return _check_parity(folder.resolve(), settings) if parity else 0


def _check_parity(folder: Path, settings: AppConfig) -> int:
    with out.status("loading the base model twice"):
        differences = parity_with_peft(folder, settings.worker_config())
    table = Table("strategy", "largest difference of a logit", title=f"against PEFT in float32, at most {TOLERANCE:g}")
    for strategy, difference in differences.items():
        table.add_row(strategy, f"{difference:.1e}")
    out.print(table)
    apart = [strategy for strategy, difference in differences.items() if not difference <= TOLERANCE]
    return _fail(f"{', '.join(apart)} differ from PEFT") if apart else 0


def _serve(server: Server, settings: AppConfig, host: str) -> None:
    started = time.monotonic()
    with server:
        with out.status("starting") as status:
            server.prepare(status.update)
            url = server.start()
            status.update("publishing the preloaded adapters")
            server.wait_ready(timeout_s=_READY_TIMEOUT_S)
            ready = server.started()
        out.print(f"ready after {time.monotonic() - started:.0f} s at {url} with {ready['num_adapters']} adapters")
        for path, reason in ready["refused"].items():
            err.print(f"not published: {path}: {reason}", style="red", markup=False)
        out.print(who_may(settings, host), markup=False)
        out.print(other_ports(settings), markup=False)
        server.wait_for_interrupt()


def who_may(settings: AppConfig, host: str) -> str:
    """What a start says of who may ask and publish."""
    if settings.keys_file is not None:
        return f"keys from {settings.keys_file}: nobody asks or publishes without one"
    if host in _LOOPBACK:
        return "HTTP on loopback only, no keys: whoever is on this machine may ask and publish"
    publishing = " and publish" if settings.allow_remote_publish else ", only this machine may publish"
    return f"no keys: whoever reaches {host} may ask{publishing}"


def other_ports(settings: AppConfig) -> str:
    """Return what the start says of the ports that listen beside HTTP."""
    guard = "guarded by Ray's token in ~/.ray/auth_token"
    if settings.allow_unauthenticated_ray:
        guard = "where allow_unauthenticated_ray may let whoever reaches them run code as this server"
    return (
        f"Ray also listens on all interfaces: gRPC on random ports, {guard}, and metrics, guarded by nothing. "
        "Close them to other machines with a firewall: README, section Ports"
    )


def _fail(message: str) -> int:
    err.print(message, style="red", markup=False)
    return 1
