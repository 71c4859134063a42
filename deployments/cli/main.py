"""`loraretriever`: start the server, and talk to it over HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from deployments.cli import batch, keys, pool, publish, routing, training
from deployments.cli.client import DEFAULT_URL, Key, Url, call, client_of, err, fail, out, use_key
from deployments.cli.client import check as check_answer

cli = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
for group in (publish, pool, routing, batch, training):
    cli.add_typer(group.commands)
cli.add_typer(keys.commands, name="keys")


@cli.callback()
def options(key: Key = None) -> None:
    """What goes before every command."""
    use_key(key)


@cli.command()
def serve(
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; see deployments/config/app.py")] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on; 0 takes a free one")] = 8000,
    preload: Annotated[list[Path] | None, typer.Option(help="adapter folders published before the start ends")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="port of the figures, for Prometheus; any free one")] = None,
) -> None:
    """Start the whole application on this machine and serve until interrupted."""
    from deployments.cli.run_server import run_server  # Ray and torch take seconds to import: only where they are used

    _exit_with(run_server(config, preload or [], host, port, metrics_port))


@cli.command()
def ask(
    prompt: str,
    model: Annotated[str, typer.Option(help="auto, the base model, or an adapter")] = "auto",
    temperature: float = 0.0,
    max_tokens: int = 256,
    url: Url = DEFAULT_URL,
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
    with client_of(url) as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        check_answer(response)
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                fail(event["error"]["message"])
            lora = event.get("lora", lora)
            for choice in event["choices"]:
                out.print(choice["delta"].get("content", ""), end="", markup=False, highlight=False)
    out.print()
    err.print(_plan_line(lora), style="dim")


@cli.command()
def route(prompt: str, url: Url = DEFAULT_URL) -> None:
    """Show which adapters would answer, without generating."""
    plan = call(url, "POST", "/v1/route", json={"prompt": prompt})["data"][0]
    weights = {adapter["name"]: adapter["weight"] for adapter in plan["adapters"]}
    table = Table("adapter", "score", "weight", title=f"strategy {plan['strategy']}, generation {plan['generation']}")
    for candidate in plan["candidates"]:
        weight = weights.get(candidate["name"])
        table.add_row(candidate["name"], f"{candidate['score']:.3f}", "" if weight is None else f"{weight:.3f}")
    out.print(table)


@cli.command()
def check(
    folder: Path,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings")] = None,
    parity: Annotated[bool, typer.Option(help="compare with PEFT: the logits of each strategy")] = False,
) -> None:
    """Check an adapter folder as the server would, without a server. What needs the model is checked at publish."""
    from deployments.cli.run_server import check_adapter  # as in `serve`

    _exit_with(check_adapter(folder, config, parity))


def _exit_with(code: int) -> None:
    if code:
        raise typer.Exit(code)


def _plan_line(lora: dict[str, Any]) -> str:
    parts = [f"{row['name']} × {row['weight']:.2f}" for row in lora["adapters"]]
    return f"{lora['strategy']}: {', '.join(parts) or 'no adapter'}"


def main() -> None:
    """The `loraretriever` command."""
    cli()
