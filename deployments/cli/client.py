"""The HTTP client of the commands, their output, and the ports of this machine."""

from __future__ import annotations

import errno
import ipaddress
import json
import math
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TextIO, get_args, get_origin
from urllib.parse import quote

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
from typer.core import TyperGroup

from deployments.json_types import JsonObject

_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # by a terminal
_PIPE_WIDTH = 1000  # of what is no terminal: no name, message or row of a table is broken


def _console(stream: TextIO, *, stderr: bool = False) -> Console:
    is_narrow = stream.isatty() or "COLUMNS" in os.environ
    return Console(width=None if is_narrow else _PIPE_WIDTH, stderr=stderr)


out = _console(sys.stdout)
err = _console(sys.stderr, stderr=True)

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE = "LORARETRIEVER_URL"
KEY_VARIABLE = "LORARETRIEVER_KEY"
REMEDY = f"start `loraretriever serve`, or set its address with --url or {URL_VARIABLE}"
_ANSWER_TIMEOUT_S = 300.0
_PROBE_TIMEOUT_S = 5.0
_UNAUTHORIZED = 401


def server_url(given: str) -> str:
    """Return the address of the server: without `/v1` and a final slash, and with a scheme. Raises: BadParameter."""
    url = given.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    scheme, separator, _ = url.partition("://")
    if separator and scheme not in ("http", "https"):
        raise typer.BadParameter("must begin with http:// or https://")
    return url if separator else f"http://{url}"


def check_local_folder(given: Path) -> Path:
    """Return a folder to write to. Raises: BadParameter for a URI, of which a path would be a folder here."""
    if re.match(r"[a-z][a-z0-9+.-]*:/", str(given)):
        raise typer.BadParameter("must be a folder on this machine, not a URI")
    return given


Url = Annotated[
    str, typer.Option("--url", "-u", envvar=URL_VARIABLE, callback=server_url, help="address of the server")
]
Key = Annotated[str | None, typer.Option("--key", envvar=KEY_VARIABLE, help="API key; before or after the command")]
Strategy = Annotated[str | None, typer.Option(help="how adapters are composed; default: the server's")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="NAME=NUMBER", help="an option of the strategy; repeatable"),
]
Json = Annotated[bool, typer.Option("--json", help="print the server's answer as JSON")]
JsonOutcome = Annotated[bool, typer.Option("--json", help="print the outcome as JSON")]
# Fields of requests whose option has another name, with the names that it has in any command.
_OTHER_NAMES = {
    "digest": ("to", "version"),
    "share": ("percent", "share"),
    "tags": ("tag",),
    "filter": ("tag",),
    "ttl_s": ("ttl",),
    "retention_s": ("retention",),
    "visibility": ("public",),
    "base_model": ("base_name",),
    "strategy_options": ("option",),
    "roles": ("role",),
}
_TYPES = {str: "TEXT", Path: "PATH", int: "NUMBER", float: "NUMBER"}
# Names of commands elsewhere and of earlier versions, with what to type.
MOVED = {
    "chat": "`loraretriever ask --chat`",
    "check": "`loraretriever publish --dry-run FOLDER`, which needs no server",
    "eval-routing": "`loraretriever route --file FILE`",
    "share": "`loraretriever trial start NAME PERCENT`, or `trial stop NAME`",
    "promote": "`loraretriever trial promote NAME`",
    "visibility": "`loraretriever access public NAME`, or `access private NAME`",
    "approve": "`loraretriever access approve NAME`",
    "verify": "`loraretriever pool verify`",
    "gc": "`loraretriever pool gc`",
    "doctor": "`loraretriever pool doctor`",
    "evaluate": "`loraretriever pool evaluate`",
    "reindex": "`loraretriever pool reindex`",
    "train-retriever": "`loraretriever pool train`",
    "run": "`loraretriever ask`",
    "ls": "`loraretriever list`",
    "ps": "`loraretriever list`, or `status` for the server",
    "rm": "`loraretriever withdraw`",
    "delete": "`loraretriever withdraw`",
    "remove": "`loraretriever withdraw`",
    "unpublish": "`loraretriever withdraw`",
    "stop": "Ctrl-C where `loraretriever serve` runs",
    "logs": "the folder that `loraretriever serve` prints at its start",
    "version": "`loraretriever --version`",
}
_params: ContextVar[Sequence[Any]] = ContextVar("params", default=())  # of the command that runs
_key: ContextVar[str | None] = ContextVar("key", default=None)  # set before the command runs


class Commands(TyperGroup):
    """A group of commands. It remembers the one that runs, whose options errors name. Without a command it helps."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for command in self.commands.values():
            for param in command.params:
                _show_plain_type(param)
                _refuse_infinite(param)

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and (ctx.resilient_parsing or _names_choices(rest)):
            fill_choices(command)
        _params.set(() if command is None else command.params)
        return name, command, rest


def _names_choices(args: Sequence[str]) -> bool:
    """Return whether a line shows or reads choices. Their registries take a while to import."""
    return any(arg.partition("=")[0] in ("-h", "--help", "--strategy", "--weights") for arg in args)


def fill_choices(command: Any) -> None:
    """Let the options of a command that name a strategy or a weighting accept the registered names."""
    from lora_store import ROUTED_STRATEGIES
    from retriever_svc import WEIGHTINGS

    choices = {"strategy": ROUTED_STRATEGIES, "weights": tuple(WEIGHTINGS)}
    for param in command.params:
        if param.name in choices:
            param.type_descriptor = replace(param.type_descriptor, annotation=Literal[choices[param.name]])
            param.metavar = None  # help shows the choices


def read_options(pairs: Sequence[str] | None) -> dict[str, float] | None:
    """Return the values of NAME=NUMBER pairs by name. Raises: BadParameter."""
    try:
        found = {name: float(value) for name, value in (pair.split("=") for pair in pairs or ())}
        if not all(map(math.isfinite, found.values())):
            raise ValueError
        return found or None
    except ValueError as exc:
        raise typer.BadParameter(f"must be NAME=NUMBER, got {' '.join(pairs or ())}", param_hint="'--option'") from exc


def _show_plain_type(param: Any) -> None:
    """Let help say TEXT or PATH for the type of a value, and nothing next to the name of an argument."""
    if param.param_type_name == "argument":
        param.display_type_rich = lambda ctx: None
    elif param.is_flag:
        param.metavar = ""
    elif param.metavar is None:
        annotation = param.type_descriptor.annotation
        inner = get_args(annotation)[0] if get_origin(annotation) is list else annotation
        param.metavar = _TYPES.get(inner)


def _refuse_infinite(param: Any) -> None:
    """Let an option or argument that is a number refuse nan and inf."""
    if param.type_descriptor.annotation is float and param.callback is None:
        param.callback = _require_finite


def _require_finite(context: Any, param: Any, value: float | None) -> float | None:
    """Refuse nan and inf, which JSON cannot carry. Raises: BadParameter."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number", ctx=context, param=param)
    return value


def name_options(message: str) -> str:
    """Return an error's message with the option that was typed in place of the request's field before its colon."""
    path, colon, text = message.partition(": ")
    *_, field = [part for part in path.split(".") if not part.isdigit()] or [""]
    wanted = (field, *_OTHER_NAMES.get(field, ()))
    found = [param for name in wanted for param in _params.get() if param.name == name]
    if not colon or not found:
        return message
    option: str = max(found[0].opts, key=len)
    return f"{option if option.startswith('-') else found[0].metavar or option.upper()}: {text}"


class KeyAnywhere(Commands):
    """The group of all commands. Its option `--key` may follow the command too."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if not args:
            return super().parse_args(ctx, args)
        end = args.index("--") if "--" in args else len(args)
        given: list[str] = []
        rest: list[str] = []
        place = 0
        while place < end:
            has_value = args[place] == "--key" and place + 1 < end
            is_key = has_value or args[place].startswith("--key=")
            (given if is_key else rest).extend(args[place : place + 1 + has_value])
            place += 1 + has_value
        return super().parse_args(ctx, [*given, *rest, *args[end:]])

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        if args and args[0] not in self.commands and (hint := MOVED.get(args[0])):
            show_error(f"there is no {args[0]!r}; use {hint}")
            raise typer.Exit(2)
        return super().resolve_command(ctx, args)


@contextmanager
def open_client(
    url: str, timeout_s: float | None = _ANSWER_TIMEOUT_S, *, remedy: str = REMEDY
) -> Iterator[httpx.Client]:
    """Yield an HTTP client. If the server cannot be reached, print why and the remedy, and exit."""
    key, hooks = _key.get(), {"response": [_note_ignored_key()]}
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        with httpx.Client(base_url=url, timeout=timeout_s, headers=headers, event_hooks=hooks) as client:
            yield client
    except httpx.ConnectError:
        fail(f"no server answers at {url}; {remedy}")
    except (httpx.TransportError, httpx.InvalidURL) as exc:
        fail(f"{url}: {exc or type(exc).__name__}")


def use_key(key: str | None) -> None:
    """Send this key with the requests of this command, without the space around it, such as a file's last newline."""
    key = None if key is None else key.strip()
    if key and not re.fullmatch("[ -~]+", key):
        fail(f"the key of --key or {KEY_VARIABLE} has a character that no header can carry")
    _key.set(key)


def has_key() -> bool:
    """Return whether this command sends a key."""
    return _key.get() is not None


def _note_ignored_key() -> Callable[[httpx.Response], None]:
    """Return a hook that says once that the server takes no keys. Later clients of this command send none."""
    unsaid = ["note: this server takes no keys; yours was ignored"]

    def hook(response: httpx.Response) -> None:
        if unsaid and has_key() and "authorization" in response.headers.get("x-ignored-headers", ""):
            err.print(unsaid.pop(), style="dim")
            use_key(None)

    return hook


def call(
    url: str,
    method: str,
    path: str,
    *,
    json: JsonObject | None = None,
    params: Mapping[str, str | list[str]] | None = None,
) -> JsonObject:
    """Return the JSON answer of the server. On an error, print the server's message and exit."""
    with open_client(url) as client:
        response = client.request(method, path, json=json, params=params)
        check(response)
        answer: JsonObject = response.json()
        return answer


def pages(url: str, path: str, params: Mapping[str, str | list[str]] | None = None) -> Iterator[JsonObject]:
    """Yield every page of a list. On an error, print the server's message and exit."""
    page: JsonObject = {"has_more": True, "last_id": ""}
    while page["has_more"]:
        page = call(url, "GET", path, params={"after": page["last_id"], **(params or {})})
        yield page


def follow(url: str, path: str, body: JsonObject, title: str) -> JsonObject:
    """Send a POST that streams its progress as JSON lines, and return the result. On an error, print it and exit."""
    with open_client(url, timeout_s=None) as client, client.stream("POST", path, json=body) as response:
        check(response)
        with progress(title, MofNCompleteColumn()) as update:
            for line in map(json.loads, response.iter_lines()):
                if "error" in line:
                    fail(name_options(line["error"]["message"]))
                if "result" in line:
                    result: JsonObject = line["result"]
                    return result
                update(completed=line["done"], total=line["total"])
    fail("the server closed the connection before it was done; run the command again")


@contextmanager
def progress(title: str, *columns: ProgressColumn, **task: Any) -> Iterator[Callable[..., None]]:
    """Show on a terminal how much is done. Yield rich's `Progress.update` for this task.

    `columns`: what stands behind the bar. `task`: options of rich's `add_task`; by default the total is not known.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), *columns)
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as shown:
        yield partial(shown.update, shown.add_task(title, **{"total": None, **task}))


def check(response: httpx.Response) -> None:
    """Exit with the message of the server if the response is an error."""
    if response.is_error:
        response.read()
        fail(name_options(find_message(response)))


def find_message(response: httpx.Response) -> str:
    """Return the message of an error response."""
    if response.status_code == _UNAUTHORIZED and not has_key():
        return f"this server requires an API key: give --key, or set {KEY_VARIABLE}"
    try:
        message: str = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the server answered with status {response.status_code}"
    if re.fullmatch(r"no adapter '[^']*'", message):
        message += "; `loraretriever list --search WORDS` finds names by a part of them"
    return message


def counted(number: int, noun: str) -> str:
    """Return the number with the noun, such as "1 sample" and "2 samples"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def behind_note(num_replicas: int) -> str:
    """Return that this many replicas do not serve a change yet."""
    return f"{counted(num_replicas, 'replica')} {'is' if num_replicas == 1 else 'are'} not up to date yet"


def describe_problem(error: Exception) -> str:
    """Return what is wrong, for an error of a file with its name."""
    if not isinstance(error, OSError) or error.filename is None:
        return str(error)
    return f"{error.filename}: {'no such file' if isinstance(error, FileNotFoundError) else error.strerror}"


def lora_path(name: str) -> str:
    """Return the path of an adapter on the server."""
    return f"/v1/loras/{quote(name, safe='')}"


def print_json(answer: JsonObject) -> None:
    """Print the answer of the server for scripts."""
    typer.echo(json.dumps(answer, indent=2, ensure_ascii=False))


def say(text: str) -> None:
    """Print a line for people as it is, however long."""
    out.print(show_controls(text), markup=False, highlight=False, soft_wrap=True)


def show_controls(text: str) -> str:
    """Return the text with a sign for each character that a terminal would obey; as it is for a file or a pipe."""
    return _OBEYED.sub("\N{REPLACEMENT CHARACTER}", text) if out.is_terminal else text


def report(answer: JsonObject, text: str, *, as_json: bool) -> None:
    """Print the answer of the server for scripts, or what it means for people."""
    if as_json:
        print_json(answer)
    else:
        say(text)


def join_lines(text: str) -> str:
    """Return the text on one line, without characters that a terminal obeys."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def show_error(message: str) -> None:
    """Print an error to stderr."""
    err.print(message, style="red", markup=False, highlight=False, soft_wrap=True)


def show_warning(message: str) -> None:
    """Print a warning to stderr."""
    err.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)


def fail(message: str) -> NoReturn:
    """Print an error and exit with code 1."""
    show_error(message)
    raise typer.Exit(1)


def answers(url: str) -> bool:
    """Return whether anything listens at the address."""
    try:
        httpx.get(f"{url}/health", timeout=_PROBE_TIMEOUT_S)
    except httpx.ConnectError:
        return False
    except (httpx.TransportError, httpx.InvalidURL):
        return True  # the command itself says what is wrong
    return True


def is_this_machine(url: str) -> bool:
    """Return whether the address is on this machine, so that the server can read its files."""
    host = httpx.URL(url).host
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def reads_paths(url: str, *, upload: bool) -> bool:
    """Return whether the server reads folders itself. With keys it does not by default."""
    return is_this_machine(url) and not upload and not has_key()


class ServerFailed(Exception):
    """The server could not start."""


def free_port(host: str) -> int:
    """Return a free port of `host`."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def check_free(host: str, port: int) -> None:
    """Check that the port is free. Raises: ServerFailed."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            hint = ""
            if exc.errno == errno.EADDRINUSE:
                hint = "; is a server already running? --port 0 uses a free port"
            raise ServerFailed(f"cannot listen on {host}:{port}: {exc.strerror}{hint}") from exc
