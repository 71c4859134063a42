"""Serve base models with many LoRA adapters: start the server, and call it over HTTP."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import httpx
import typer
from rich.table import Table

from deployments.cli import access, batch, compose, keys, name, pool, pool_upkeep, publish, samples, trial, usage
from deployments.cli.client import ServerFailed, call, check_free, open_client
from deployments.cli.client import check as check_answer
from deployments.cli.options import DEFAULT_URL, Json, Key, KeyAnywhere, Options, Strategy, Url, Version, read_options
from deployments.cli.output import (
    counted,
    describe_problem,
    err,
    fail,
    join_lines,
    out,
    print_json,
    say,
    show_error,
    show_warning,
    write,
)
from deployments.json_types import JsonObject

if TYPE_CHECKING:
    from deployments.config.app import AppConfig

_HELP = {"help_option_names": ["-h", "--help"]}
cli = typer.Typer(cls=KeyAnywhere, help=__doc__, pretty_exceptions_enable=False, context_settings=_HELP)
for group in (publish, pool, compose, batch, usage):
    cli.add_typer(group.commands)
cli.add_typer(trial.commands, name="trial")
cli.add_typer(access.commands, name="access")
cli.add_typer(name.commands, name="name")
cli.add_typer(pool_upkeep.commands, name="pool")
cli.add_typer(keys.commands, name="keys")
cli.add_typer(samples.commands, name="samples")


Prompt = Annotated[
    list[str] | None,
    typer.Argument(metavar="TEXT", help="the prompt; several words are joined, and - reads standard input"),
]
Abstain = Annotated[
    Literal["never", "lenient", "balanced", "strict"] | None,
    typer.Option(help="how readily the base model answers instead of adapters; default: the server's"),
]
NumAdapters = Annotated[int | None, typer.Option("--k", "-k", help="number of adapters; default: the server's")]
MAX_PORT = 65_535
_CHAT = "/v1/chat/completions"


@cli.callback()
def options(key: Key = None, version: Version = False) -> None:
    """Serve base models with many LoRA adapters: start the server, and call it over HTTP."""


@cli.command()
def serve(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of settings")] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", "-p", min=0, max=MAX_PORT, help="port to listen on; 0 uses a free port")
    ] = 8000,
    preload: Annotated[
        list[Path] | None, typer.Option(help="adapter folders to publish during the start; repeatable")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=MAX_PORT, help="port of the Prometheus metrics; default: a free port")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", "-m", help="model hub id, folder or GGUF file; overrides the settings")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; overrides the settings")] = None,
    template: Annotated[str | None, typer.Option(help="auto, alpaca or chat; overrides the settings")] = None,
    store: Annotated[str | None, typer.Option(help="folder or URI of the pool; overrides the settings")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="log what the start does")] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="print the settings in use as YAML, and start nothing")
    ] = False,
) -> None:
    """Start the server on this machine and run it until interrupted."""
    given = {
        "base_model": base_model,
        "template": template,
        "store_uri": store,
        "preload": preload,
        "worker": None if device is None else {"device": device},
    }
    empty = [name for name, text in (("host", host), ("store", store), ("base-model", base_model)) if text == ""]
    if empty:  # as an unset shell variable gives it; an empty host would listen on all addresses
        fail(f"--{empty[0]}: is empty; give a value, or leave the option out")
    changes = {name: value for name, value in given.items() if value}
    settings = _settings_of_server(config, changes)
    if print_config:
        from deployments.config.loading import dump_config

        sys.stdout.write(dump_config(settings))
        return
    try:
        if port:
            check_free(host, port)
        importlib.import_module("deployments.serve_import")  # before anything else imports Serve
        from deployments.private_names import check_libraries

        check_libraries(of_engine=False)
    except (ServerFailed, ImportError) as exc:
        fail(exc)
    from deployments.cli.run_server import run_server  # Ray takes seconds to import

    run_server(settings, host, port, metrics_port, is_verbose=verbose)


@cli.command()
def ask(
    prompt: Prompt = None,
    model: Annotated[str, typer.Option("--model", "-m", help="auto, the base model, or an adapter")] = "auto",
    talks: Annotated[
        bool,
        typer.Option("--chat", "-i", help="talk in several turns, one prompt a line; /new starts again, /exit ends"),
    ] = False,
    temperature: Annotated[float, typer.Option(help="0 always picks the most likely token")] = 0.0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="upper bound of an answer's tokens")] = 256,
    abstain: Abstain = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="system message before the first prompt")] = None,
    strategy: Strategy = None,
    k: NumAdapters = None,
    option: Options = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print the server's answer as JSON; with --chat all messages at the end")
    ] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Stream the answer to a prompt, then print the adapters that gave it. With --chat, talk in several turns."""
    opening: list[JsonObject] = [] if system is None else [{"role": "system", "content": system}]
    options = _make_options(strategy_options=read_options(option), abstain=abstain, strategy=strategy, k=k)
    body = {"model": model, "temperature": temperature, "max_tokens": max_tokens, **options}
    if talks:
        _chat(url, body, opening, first=" ".join(prompt or ()), as_json=as_json)
        return
    body["messages"] = [*opening, {"role": "user", "content": _join_words(prompt)}]
    if as_json:
        print_json(call(url, "POST", _CHAT, json=body))
    else:
        _stream(url, body)


def _chat(url: str, body: JsonObject, opening: list[JsonObject], *, first: str, as_json: bool) -> None:
    """Answer one prompt a line. `/new` starts again; `/exit` or the end of the input ends it."""
    messages = list(opening)
    if sys.stdin.isatty():
        err.print("one prompt a line; /new starts again, /exit ends", style="dim", highlight=False)
    for line in chain([first] if first else [], _lines()):
        if line in ("/exit", "/quit"):
            break
        if line == "/new":
            messages = list(opening)
        elif line:
            messages.append({"role": "user", "content": line})
            answer = _stream(url, {**body, "messages": messages}, is_quiet=as_json)
            messages.append({"role": "assistant", "content": answer})
    if as_json:
        print_json({"messages": messages})


def _lines() -> Iterator[str]:
    """Yield the lines that a person or a pipe enters, without surrounding space."""
    if sys.stdin.isatty():
        with suppress(ImportError):  # some builds of Python lack it
            importlib.import_module("readline")  # arrow keys edit the line and recall earlier ones
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return


def _stream(url: str, body: JsonObject, *, is_quiet: bool = False) -> str:
    """Print the answer as it arrives, then its adapters. Return the answer. `is_quiet`: print nothing."""
    lora: JsonObject = {}
    parts: list[str] = []
    with open_client(url, waits=True) as client, client.stream("POST", _CHAT, json=body | {"stream": True}) as response:
        check_answer(response)
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                fail(event["error"]["message"])
            lora = event.get("lora", lora)
            for choice in event["choices"]:
                parts.append(choice["delta"].get("content") or "")
                if not is_quiet:
                    write(parts[-1])
        if not is_quiet:
            write("\n")
            nearest = _find_nearest(client, body) if lora.get("abstained") else []
            err.print(_plan_line(lora, nearest), style="dim")
    return "".join(parts)


def _find_nearest(client: httpx.Client, body: JsonObject) -> list[str]:
    """Return the adapters that are nearest to the last message, although none fits."""
    prompt, options = body["messages"][-1]["content"], {**body.get("lora", {}), "k": 3, "fallback": "base"}
    response = client.post("/v1/route", json={"prompt": prompt, "model": body["model"], "lora": options})
    candidates = [] if response.is_error else response.json()["data"][0]["candidates"]
    return [candidate["name"] for candidate in candidates]


@cli.command()
def route(
    prompt: Prompt = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            help="measure routing with JSON lines instead:"
            ' {"input" or "prompt": text, "adapter": name, list of names, or null}',
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="as in a request, such as BASE:auto or a model name")
    ] = None,
    abstain: Abstain = None,
    strategy: Strategy = None,
    k: NumAdapters = None,
    option: Options = None,
    tag: Annotated[
        list[str] | None, typer.Option("--tag", "-t", help="choose among adapters with this tag; repeatable")
    ] = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Show which adapters would answer a prompt, without generating. With --file, measure how often they are right."""
    if file is not None:
        if prompt or any(each is not None for each in (model, abstain, strategy, k, option, tag)):
            raise typer.BadParameter(
                "it measures with the server's defaults, so it cannot be combined with a prompt or with options",
                param_hint="--file",
            )
        from deployments.cli.routing import measure_routing

        measure_routing(file, url, as_json=as_json)
        return
    wanted = {"tags": tag} if tag else None
    options = _make_options(
        strategy_options=read_options(option), abstain=abstain, strategy=strategy, k=k, filter=wanted, explain=True
    )
    body = {"prompt": _join_words(prompt), **({} if model is None else {"model": model}), **options}
    plan = call(url, "POST", "/v1/route", json=body)["data"][0]
    if as_json:
        print_json(plan)
        return
    weights = {adapter["name"]: f"{adapter['weight']:.3f}" for adapter in plan["adapters"]}
    title = f"strategy {plan['strategy']}, generation {plan['generation']}"
    title += f", base model {plan['base_model']}" if "base_model" in plan else ""
    table = Table("adapter", "score", "needs", "confidence", "weight", title=title)
    for candidate in plan["candidates"]:
        name, shown = candidate["name"], (candidate[key] for key in ("score", "threshold", "confidence"))
        table.add_row(name, *(f"{value:.3f}" for value in shown), weights.get(name, ""))
    if plan["candidates"]:
        out.print(table)
    if "why" in plan:
        say(plan["why"])
    if contract := plan.get("contract"):
        say(f"{contract['adapter']} is asked by its contract: {', '.join(contract['applied'])}.")
    for candidate in plan["candidates"]:
        for sample in candidate.get("samples", ()):
            say(join_lines(f"sample of {candidate['name']}, {sample['score']:.3f}: {sample['input']}"))


@cli.command()
def status(as_json: Json = False, url: Url = DEFAULT_URL) -> None:
    """Show the server: its base model, its pool and its load."""
    found = call(url, "GET", "/v1/stats")
    if as_json:
        print_json(found)
        return
    pool_facts, workers, defaults = found["pool"], found["workers"], found["defaults"]
    say(f"server:   {url}")
    say(f"model:    {', '.join(found.get('models', [found['base_model']]))}")
    if pool_facts["num_adapters"] is None:
        say("pool:     not known, because no Retriever answers")
    else:
        usable = counted(pool_facts["num_adapters"], "adapter")
        say(f"pool:     {usable} that you may use, at generation {pool_facts['generation']}")
        for row in call(url, "GET", "/v1/loras", params={"limit": "1"}).get("unserved", []):
            show_warning(row["text"])
    say(f"routing:  {defaults['strategy']}, k = {defaults['k']}")
    if workers is None:
        say("workers:  shown to keys with the role admin")
        return
    for base_model, own in found.get("models", {"": workers}).items():
        if base_model:
            say(f"\n{base_model}")
        for line in _describe_load(own):
            say(line)


def _describe_load(workers: JsonObject) -> list[str]:
    """Return the replicas, the load and the memory of the workers of one base model."""
    replicas = workers["replicas"]
    if not any(replicas.values()):
        return ["workers:  none; the next request starts one"]
    silent = f", {replicas['silent']} silent" if replicas["silent"] else ""
    load = f"{workers['num_running']} of {workers['max_running']} rows running, {workers['num_waiting']} waiting"
    bank = f"{workers['bank_adapters']} adapters in {workers['bank_rows_occupied']} of {workers['bank_rows']} rank rows"
    return [f"workers:  {replicas['answered']}{silent}; {load}", f"bank:     {bank}"]


def _settings_of_server(config: Path | None, changes: JsonObject) -> AppConfig:
    """Return the settings in use. Exit if they are invalid, or name files that do not exist."""
    from deployments.config import loading  # pydantic takes half a second to import

    try:
        settings = loading.load_config(config, **changes)
        for model in settings.by_model.values():
            loading.require_base_model(model.base_model, model.worker.engine)
        loading.require_keys_file(settings.keys_file)
    except (ValueError, OSError) as exc:
        fail(exc)
    return settings


def _make_options(**options: object) -> JsonObject:
    """Return the `lora` object of a request with the options that were given; nothing without any."""
    given = {name: value for name, value in options.items() if value is not None}
    return {"lora": given} if given else {}


def _join_words(prompt: list[str] | None) -> str:
    """Return the words as one text; `-` alone means standard input. Raises: BadParameter for an empty one."""
    text = sys.stdin.read().strip() if prompt == ["-"] else " ".join(prompt or ())
    if not text.strip():
        raise typer.BadParameter("the prompt is empty", param_hint="TEXT")
    return text


def _plan_line(lora: JsonObject, nearest: list[str]) -> str:
    parts = [f"{row['name']} × {row['weight']:.2f}" for row in lora["adapters"]]
    base_model = f" on {lora['base_model']}" if "base_model" in lora else ""
    none = "no adapter"
    if lora.get("abstained"):
        verb = "is" if len(nearest) == 1 else "are"
        none += f" fits; the nearest {verb} {', '.join(nearest)}" if nearest else " fits"
        none += ". `loraretriever route` with the same prompt says why, and --model NAME asks one adapter"
    return f"{lora['strategy']}{base_model}: {', '.join(parts) or none}"


def main() -> None:
    """The `loraretriever` command. Text that is not UTF-8 and errors of standard output are a line."""
    try:
        cli()
    except UnicodeEncodeError as exc:
        if exc.reason != "surrogates not allowed":
            raise
        show_error("an argument or the standard input is not text in UTF-8")
        sys.exit(2)
    except OSError as exc:
        show_error(describe_problem(exc))
        sys.exit(1)
