"""Serve one base model with many LoRA adapters: start the server, and call it over HTTP."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from deployments.cli import batch, keys, pool, publish, routing, training
from deployments.cli.client import (
    DEFAULT_URL,
    Json,
    Key,
    KeyAnywhere,
    ServerFailed,
    Url,
    call,
    check_free,
    client_of,
    err,
    fail,
    out,
    print_json,
    use_key,
)
from deployments.cli.client import check as check_answer
from deployments.json_types import JsonObject

cli = typer.Typer(cls=KeyAnywhere, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
for group in (publish, pool, routing, batch, training):
    cli.add_typer(group.commands)
cli.add_typer(keys.commands, name="keys")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        out.print(f"loraretriever {importlib.metadata.version('loraretriever')}", highlight=False)
        raise typer.Exit()


Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")]
Prompt = Annotated[
    list[str],
    typer.Argument(metavar="PROMPT...", help="the prompt; several words are joined, and - reads standard input"),
]
Abstain = Annotated[
    str | None,
    typer.Option(
        help="how readily the base model answers in place of adapters: never, lenient, balanced or strict; "
        "default: the server's"
    ),
]

Strategy = Annotated[str | None, typer.Option(help="selection, mixture or fusion; default: the server's")]
NumAdapters = Annotated[int | None, typer.Option("--k", help="number of adapters; default: the server's")]
_CHAT = "/v1/chat/completions"


@cli.callback()
def options(key: Key = None, version: Version = False) -> None:
    """Serve one base model with many LoRA adapters: start the server, and call it over HTTP."""
    use_key(key)


@cli.command()
def serve(
    config: Annotated[Path | None, typer.Option(help="YAML file of settings")] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on; 0 uses a free port")] = 8000,
    preload: Annotated[
        list[Path] | None, typer.Option(help="adapter folders to publish during the start; repeatable")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="port of the Prometheus metrics; default: a free port")
    ] = None,
) -> None:
    """Start the server on this machine and run it until interrupted."""
    if port:
        _require_free(host, port)
    from deployments.cli.run_server import run_server  # Ray and torch take seconds to import

    _exit_with(run_server(config, preload or [], host, port, metrics_port))


@cli.command()
def ask(
    prompt: Prompt,
    model: Annotated[str, typer.Option(help="auto, the base model, or an adapter")] = "auto",
    temperature: Annotated[float, typer.Option(help="0 always picks the most likely token")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="upper bound of the answer's tokens")] = 256,
    abstain: Abstain = None,
    system: Annotated[str | None, typer.Option(help="system message before the prompt")] = None,
    strategy: Strategy = None,
    k: NumAdapters = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Stream the answer to a prompt, then print the adapters that gave it."""
    messages = [{"role": "user", "content": _text_of(prompt)}]
    body = {
        "model": model,
        "messages": messages if system is None else [{"role": "system", "content": system}, *messages],
        "temperature": temperature,
        "max_tokens": max_tokens,
        **_options_of(abstain=abstain, strategy=strategy, k=k),
    }
    if as_json:
        print_json(call(url, "POST", _CHAT, json=body))
    else:
        _stream(url, body | {"stream": True})


def _stream(url: str, body: JsonObject) -> None:
    lora: JsonObject = {}
    with client_of(url) as client, client.stream("POST", _CHAT, json=body) as response:
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
def route(
    prompt: Prompt,
    abstain: Abstain = None,
    strategy: Strategy = None,
    k: NumAdapters = None,
    tag: Annotated[list[str] | None, typer.Option(help="choose among adapters with this tag; repeatable")] = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Show which adapters would answer a prompt, without generating."""
    wanted = {"tags": tag} if tag else None
    options = _options_of(abstain=abstain, strategy=strategy, k=k, filter=wanted, explain=True)
    plan = call(url, "POST", "/v1/route", json={"prompt": _text_of(prompt), **options})["data"][0]
    if as_json:
        print_json(plan)
        return
    weights = {adapter["name"]: f"{adapter['weight']:.3f}" for adapter in plan["adapters"]}
    title = f"strategy {plan['strategy']}, generation {plan['generation']}"
    table = Table("adapter", "score", "needs", "confidence", "weight", title=title)
    for candidate in plan["candidates"]:
        name, shown = candidate["name"], (candidate[key] for key in ("score", "threshold", "confidence"))
        table.add_row(name, *(f"{value:.3f}" for value in shown), weights.get(name, ""))
    out.print(table)
    if "why" in plan:
        out.print(plan["why"], markup=False, highlight=False)
    for candidate in plan["candidates"]:
        for sample in candidate.get("samples", ()):
            line = f"sample of {candidate['name']}, {sample['score']:.3f}: {sample['input']}"
            plain = "".join(char if char.isprintable() else " " for char in line)  # no escape sequences of terminals
            out.print(" ".join(plain.split()), markup=False, highlight=False)


@cli.command()
def check(
    folder: Annotated[Path, typer.Argument(help="the adapter folder")],
    config: Annotated[Path | None, typer.Option(help="YAML file of settings")] = None,
    parity: Annotated[bool, typer.Option(help="compare the logits of each strategy with those of PEFT")] = False,
) -> None:
    """Check an adapter folder without a server. Publishing also checks what needs the base model."""
    from deployments.cli.check_adapter import check_adapter  # the store's libraries take most of a second to import

    _exit_with(check_adapter(folder, config, parity))


def _options_of(**options: object) -> JsonObject:
    """Return the `lora` object of a request with the options that were given; nothing without any."""
    given = {name: value for name, value in options.items() if value is not None}
    return {"lora": given} if given else {}


def _require_free(host: str, port: int) -> None:
    """Exit with the reason if the port cannot be used."""
    try:
        check_free(host, port)
    except ServerFailed as exc:
        fail(str(exc))


def _text_of(prompt: list[str]) -> str:
    """Return the words as one text; `-` alone means standard input."""
    return sys.stdin.read().strip() if prompt == ["-"] else " ".join(prompt)


def _exit_with(code: int) -> None:
    if code:
        raise typer.Exit(code)


def _plan_line(lora: JsonObject) -> str:
    parts = [f"{row['name']} × {row['weight']:.2f}" for row in lora["adapters"]]
    return f"{lora['strategy']}: {', '.join(parts) or 'no adapter'}"


def main() -> None:
    """The `loraretriever` command."""
    cli()
