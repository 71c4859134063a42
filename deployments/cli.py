"""`loraretriever`: start the server, and talk to it over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import httpx
import typer
from rich.console import Console
from rich.table import Table

cli = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
out = Console()
err = Console(stderr=True)

Url = Annotated[str, typer.Option("--url", help="the server to talk to")]
_URL = "http://127.0.0.1:8000"
_ANSWER_TIMEOUT_S = 300.0


@cli.command()
def serve(
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; see deployments/config.py")] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on; 0 takes a free one")] = 8000,
    preload: Annotated[list[Path] | None, typer.Option(help="adapter folders published before the start ends")] = None,
) -> None:
    """Start the whole application on this machine and serve until interrupted."""
    from deployments.local_commands import run_server  # Ray and torch take seconds to import: only where they are used

    _exit_with(run_server(config, preload or [], host, port))


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
    from deployments.local_commands import check_adapter  # as in `serve`

    _exit_with(check_adapter(folder, config))


def _exit_with(code: int) -> None:
    if code:
        raise typer.Exit(code)


@contextmanager
def _client(url: str) -> Iterator[httpx.Client]:
    """A client of the server; when it cannot be reached, the command ends and says so."""
    try:
        with httpx.Client(base_url=url, timeout=_ANSWER_TIMEOUT_S) as client:
            yield client
    except httpx.ConnectError:
        _fail(f"no server answers at {url}; start one with `loraretriever serve`")
    except (httpx.TransportError, httpx.InvalidURL) as exc:
        _fail(f"{url}: {exc or type(exc).__name__}")


def _call(url: str, method: str, path: str, **request: Any) -> dict[str, Any]:
    with _client(url) as client:
        response = client.request(method, path, **request)
        _check(response)
        answer: dict[str, Any] = response.json()
        return answer


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
