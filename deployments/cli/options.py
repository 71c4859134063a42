"""The options that commands share, their groups, and the names that errors give to what was typed."""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperGroup

from deployments.cli.output import fail, out, show_error

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE = "LORARETRIEVER_URL"
KEY_VARIABLE = "LORARETRIEVER_KEY"
_key: ContextVar[str | None] = ContextVar("key", default=None)  # set before the command runs


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


def use_key(key: str | None) -> str | None:
    """Send this key with the requests of this command, without the space around it, such as a file's last newline."""
    key = None if key is None else key.strip()
    if key and not re.fullmatch("[ -~]+", key):
        fail(f"the key of --key or {KEY_VARIABLE} has a character that no header can carry")
    _key.set(key)
    return key


def find_key() -> str | None:
    """Return the key that this command sends."""
    return _key.get()


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        out.print(f"loraretriever {importlib.metadata.version('loraretriever')}", highlight=False)
        raise typer.Exit()


Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")]
Url = Annotated[
    str, typer.Option("--url", "-u", envvar=URL_VARIABLE, callback=server_url, help="address of the server")
]
Key = Annotated[
    str | None,
    typer.Option("--key", envvar=KEY_VARIABLE, callback=use_key, help="API key; before or after the command"),
]
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
_params: ContextVar[Sequence[Any]] = ContextVar("params", default=())  # those of the running command


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
    """Return an error message that names the typed option where it began with a field of the request."""
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
