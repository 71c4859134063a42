"""`loraretriever`: start the server, and talk to it over HTTP."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import httpx
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from deployments.config import AppConfig, load_config
from deployments.server import Server, ServerFailed
from lora_store import AdapterRefused, check_folder
from lora_store.admission import Label

cli = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
out = Console()
err = Console(stderr=True)

Url = Annotated[str, typer.Option("--url", help="the server to talk to")]
_URL = "http://127.0.0.1:8000"
_READY_TIMEOUT_S = 600.0
_ANSWER_TIMEOUT_S = 300.0


@cli.command()
def serve(
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; see deployments/config.py")] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on; 0 takes a free one")] = 8000,
    preload: Annotated[list[Path] | None, typer.Option(help="adapter folders published before the start ends")] = None,
) -> None:
    """Start the whole application on this machine and serve until interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # waiting for /ready is no news
    settings = _settings(config, preload or [])
    try:
        _serve(settings, host, port)
    except ServerFailed as exc:
        _fail(str(exc))


def _serve(settings: AppConfig, host: str, port: int) -> None:
    started = time.monotonic()
    with Server(settings, host=host, port=port) as server, out.status("starting") as status:
        server.prepare(status.update)
        url = server.start()
        status.update("publishing the preloaded adapters")
        ready = server.wait_ready(timeout_s=_READY_TIMEOUT_S)
        status.stop()
        out.print(f"ready after {time.monotonic() - started:.0f} s at {url} with {ready['num_adapters']} adapters")
        for path, reason in ready["refused"].items():
            err.print(f"not published: {path}: {reason}", style="red", markup=False)
        if host in ("127.0.0.1", "localhost", "::1"):
            out.print("loopback only, no keys: whoever is on this machine may ask and publish")
        server.wait_for_interrupt()


@cli.command()
def ask(
    prompt: str,
    model: Annotated[str, typer.Option(help="auto, the base model, or an adapter")] = "auto",
    temperature: float = 0.0,
    max_tokens: int = 256,
    url: Url = _URL,
) -> None:
    """Print the answer to one prompt as it comes, and the adapters that gave it."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": temperature,
        "max_tokens": max_tokens,
        "stream": True,
    }
    lora: dict[str, Any] = {}
    with _client(url) as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        _check(response)
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                _fail(event["error"]["message"])
            lora = event.get("lora", lora)
            for choice in event["choices"]:
                out.print(choice["delta"].get("content", ""), end="", markup=False, highlight=False)
    out.print()
    err.print(_plan_line(lora), style="dim")


@cli.command()
def route(prompt: str, url: Url = _URL) -> None:
    """Show which adapters would answer, without generating."""
    plan = _call(url, "POST", "/v1/route", json={"prompt": prompt})["data"][0]
    weights = {adapter["name"]: adapter["weight"] for adapter in plan["adapters"]}
    table = Table("adapter", "score", "weight", title=f"strategy {plan['strategy']}, generation {plan['generation']}")
    for candidate in plan["candidates"]:
        weight = weights.get(candidate["name"])
        table.add_row(candidate["name"], f"{candidate['score']:.3f}", "" if weight is None else f"{weight:.3f}")
    out.print(table)


@cli.command("list")
def list_adapters(url: Url = _URL) -> None:
    """List the pool."""
    answer = _call(url, "GET", "/v1/loras")
    table = Table("adapter", "digest", "ranks", "bytes", "samples", "auto", title=f"generation {answer['generation']}")
    for row in answer["data"]:
        ranks = ", ".join(map(str, row["ranks"]))
        auto = "yes" if row["found_by_auto"] else "by name only"
        table.add_row(row["name"], row["digest"][:12], ranks, str(row["num_bytes"]), str(row["num_samples"]), auto)
    out.print(table)


@cli.command()
def publish(folders: list[Path], url: Url = _URL) -> None:
    """Publish adapter folders to a running server on this machine."""
    failed = 0
    with _client(url) as client:
        for folder in folders:
            response = client.post("/v1/loras", json={"path": str(folder.resolve())})
            if response.is_error:
                failed += 1
                err.print(f"{folder}: {_message(response)}", style="red", markup=False)
                continue
            answer = response.json()
            note = "" if answer["found_by_auto"] else " (no samples: by name only)"
            out.print(f"{answer['name']} is live at generation {answer['generation']}{note}")
    if failed:
        raise typer.Exit(1)


@cli.command()
def check(folder: Path, config: Annotated[Path | None, typer.Option(help="YAML file of settings")] = None) -> None:
    """Check an adapter folder as the server would, without a server. What needs the model is checked at publish."""
    settings = _settings(config, [])
    label = Label(folder.resolve().name, "local", (), None, "public")
    try:
        admitted = check_folder(folder, label, accepts_base=settings.accepted_bases, module_shapes=None)
    except AdapterRefused as exc:
        for reason in exc.reasons:
            err.print(f"refused: {reason}", style="red", markup=False)
        raise typer.Exit(1) from exc
    out.print(f"{label.name}: {len(admitted.modules)} modules, {len(admitted.samples)} samples, fit to publish")


def _settings(config: Path | None, preload: list[Path]) -> AppConfig:
    try:
        return load_config(config, **({"preload": preload} if preload else {}))
    except (ValidationError, OSError, ValueError) as exc:
        _fail(str(exc))


def _client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=_ANSWER_TIMEOUT_S)


def _call(url: str, method: str, path: str, **request: Any) -> dict[str, Any]:
    try:
        with _client(url) as client:
            response = client.request(method, path, **request)
            _check(response)
            answer: dict[str, Any] = response.json()
            return answer
    except httpx.ConnectError:
        _fail(f"no server answers at {url}; start one with `loraretriever serve`")


def _check(response: httpx.Response) -> None:
    if response.is_error:
        response.read()
        _fail(_message(response))


def _message(response: httpx.Response) -> str:
    try:
        message: str = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the server answered {response.status_code}"
    return message


def _fail(message: str) -> NoReturn:
    err.print(message, style="red", markup=False)
    raise typer.Exit(1)


def _plan_line(lora: dict[str, Any]) -> str:
    parts = [f"{row['name']} × {row['weight']:.2f}" for row in lora["adapters"]]
    return f"{lora['strategy']}: {', '.join(parts) or 'no adapter'}"


def main() -> None:
    """The `loraretriever` command."""
    cli()
