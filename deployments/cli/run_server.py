"""Run `loraretriever serve` and `loraretriever check`."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from rich.table import Table

from deployments.auth.key_file import keys_of
from deployments.cli.client import out, show_error
from deployments.cli.local_server import Server, ServerFailed
from deployments.cli.peft_parity import TOLERANCE, parity_with_peft
from deployments.config.app import AppConfig, load_config
from deployments.errors import ProxyUnsafe
from deployments.publishing.adapter_folders import adapter_folders
from lora_store import AdapterRefused, CheckedFolder, check_folder

_READY_TIMEOUT_S = 600.0
_ENOUGH_SAMPLES = 20  # more improve routing little
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def run_server(config: Path | None, preload: list[Path], host: str, port: int, metrics_port: int | None = None) -> int:
    """Run the server until interrupted. Return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # polls of /ready are not worth a line
    try:
        settings = load_config(config, **({"preload": preload} if preload else {}))
        for path in settings.preload:
            if not adapter_folders(path):
                return _fail(f"preload: {_folder_problem(path)}")
        keys_of(settings)  # an unusable keys file stops the start here
        _serve(Server(settings, host=host, port=port, metrics_port=metrics_port), settings, host)
    except (ServerFailed, ProxyUnsafe, ValueError, OSError) as exc:
        return _fail(str(exc))
    return 0


def check_adapter(folder: Path, config: Path | None, parity: bool) -> int:
    """Print whether the folder can be published, or every reason why not. Return the exit code.

    `parity`: also compare the logits with those of PEFT.
    """
    if problem := _folder_problem(folder):
        return _fail(problem)
    try:
        settings = load_config(config)
        admitted = check_folder(folder.resolve(), accepts_base=settings.accepted_bases, module_shapes=None)
    except AdapterRefused as exc:
        return _fail("\n".join(f"refused: {reason}" for reason in exc.reasons))
    except (ValueError, OSError) as exc:
        return _fail(str(exc))
    out.print(f"{folder.resolve().name}: {_summary(admitted)}", markup=False, highlight=False)
    return _check_parity(folder.resolve(), settings) if parity else 0


def _folder_problem(folder: Path) -> str | None:
    """Return why `folder` cannot be an adapter folder, or None."""
    if not folder.exists():
        return f"{folder}: no such folder"
    if not folder.is_dir():
        return f"{folder}: is a file; give the folder that contains it"
    found = adapter_folders(folder)
    if found == [folder]:
        return None
    hint = f"; found adapters in {', '.join(path.name for path in found)}" if found else ""
    return f"{folder}: no adapter here, adapter_config.json is missing{hint}"


def _summary(admitted: CheckedFolder) -> str:
    num_samples = len(admitted.samples)
    parts = [f"{len(admitted.modules)} modules", f"{num_samples} {'sample' if num_samples == 1 else 'samples'}"]
    hint = ""
    if not num_samples:
        hint = ", but auto cannot find it: add lora_samples.jsonl or description.txt"
    elif num_samples < _ENOUGH_SAMPLES:
        hint = f"; auto finds it more reliably with {_ENOUGH_SAMPLES} samples"
    return f"{', '.join(parts)}, fit to publish{hint}"


def _check_parity(folder: Path, settings: AppConfig) -> int:
    with out.status("loading the base model twice"):
        differences = parity_with_peft(folder, settings.worker_config())
    table = Table("strategy", "largest logit difference", title=f"compared with PEFT in float32, at most {TOLERANCE:g}")
    for strategy, difference in differences.items():
        table.add_row(strategy, f"{difference:.1e}")
    out.print(table)
    failed = [strategy for strategy, difference in differences.items() if not difference <= TOLERANCE]
    return _fail(f"{', '.join(failed)} differ from PEFT by more than {TOLERANCE:g}") if failed else 0


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
            show_error(f"not published: {path}: {reason}")
        out.print(template_note(settings), markup=False)
        out.print(access_note(settings, host), markup=False)
        out.print(ports_note(settings), markup=False)
        server.wait_for_interrupt()


def template_note(settings: AppConfig) -> str:
    """Say which prompt template chats use."""
    if settings.template_in_use == "alpaca":
        return "chats use the Alpaca prompt template"
    if settings.template_in_use == "auto":
        return "chats use the base model's own chat template, or Alpaca's if it has none"
    source = "the base model's own chat template" if settings.chat_template is None else str(settings.chat_template)
    return f"chats use {source}"


def access_note(settings: AppConfig, host: str) -> str:
    """Say who may send requests and publish."""
    if settings.keys_file is not None:
        return f"keys from {settings.keys_file}: every request needs one"
    if settings.api_key is not None:
        return "one API key, from the settings: every request needs it"
    if host in _LOOPBACK:
        return "HTTP on loopback only, no keys: any local process may send requests and publish"
    publishing = " and publish" if settings.allow_remote_publish else "; only this machine may publish"
    return f"no keys: anyone who reaches {host} may send requests{publishing}"


def ports_note(settings: AppConfig) -> str:
    """Describe the ports that listen besides HTTP."""
    guard = "protected by Ray's token in ~/.ray/auth_token"
    if settings.allow_unauthenticated_ray:
        guard = "unprotected because of allow_unauthenticated_ray: anyone who reaches them may run code as this server"
    return (
        f"Ray also listens on all interfaces: gRPC on random ports, {guard}, and metrics without protection. "
        "Block these ports for other machines with a firewall"
    )


def _fail(message: str) -> int:
    """Print an error and return the exit code 1."""
    show_error(message)
    return 1
