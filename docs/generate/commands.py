"""The command line, as the command itself describes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from typer.main import get_command

from deployments.cli.main import cli
from deployments.cli.options import fill_choices
from docs.generate.markdown import code, table

_PROGRAM = "loraretriever"
_KINDS = {str: "text", int: "integer", float: "number", Path: "path", bool: "flag"}


def commands() -> str:
    """Return one section for each command: usage, purpose, arguments and options."""
    root = get_command(cli)
    sections = [_section(_PROGRAM, root)] if root.params else []
    return "\n".join([*sections, *(_section(name, command) for name, command in _leaves(_PROGRAM, root))])


def _leaves(prefix: str, group: Any) -> Iterator[tuple[str, Any]]:
    """Yield (full name, command) of every command below a group, in alphabetical order."""
    for name, command in sorted(getattr(group, "commands", {}).items()):
        if getattr(command, "commands", None):
            yield from _leaves(f"{prefix} {name}", command)
        else:
            yield f"{prefix} {name}", command


def _section(name: str, command: Any) -> str:
    fill_choices(command)
    parameters = [row for row in map(_parameter, command.params) if row is not None]
    is_root = name == _PROGRAM
    title = "Options before the command" if is_root else name
    text = "" if is_root else (command.help or "").strip() + "\n\n"
    rows = table(("name", "value", "default", "meaning"), parameters) if parameters else ""
    return f"### {title}\n\n{text}{rows}"


def _parameter(parameter: Any) -> tuple[str, str, str, str] | None:
    """Return the table's row of one argument or option; None for `--help` and hidden ones."""
    names = [*parameter.opts, *parameter.secondary_opts]
    if parameter.hidden or "--help" in names:
        return None
    is_option = parameter.param_type_name == "option"
    shown = ", ".join(map(code, names)) if is_option else code((parameter.metavar or parameter.name).upper())
    kind = "flag" if getattr(parameter, "is_flag", False) else _kind(parameter.type_descriptor.annotation)
    if parameter.multiple or parameter.nargs == -1:
        kind += ", repeatable"
    return shown, kind, _default(parameter), _meaning(parameter)


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(code(str(value)) for value in get_args(annotation))
    inner = get_args(annotation)[0] if get_origin(annotation) is list else annotation
    return _KINDS.get(inner, str(getattr(inner, "__name__", inner)))


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    default = parameter.default
    is_shown = isinstance(default, int | float | str) and default is not False
    return code(str(default)) if is_shown else ""


def _meaning(parameter: Any) -> str:
    text = parameter.help or ""
    return f"{text} (environment: `{parameter.envvar}`)" if parameter.envvar else text
