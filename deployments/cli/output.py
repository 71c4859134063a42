"""What the commands print: lines for people, JSON for scripts, errors and progress."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn

from deployments.json_types import JsonObject

_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # by a terminal
_PIPE_WIDTH = 1000  # of what is no terminal: no name, message or row of a table is broken


def _console(stream: TextIO, *, stderr: bool = False) -> Console:
    is_narrow = stream.isatty() or "COLUMNS" in os.environ
    return Console(width=None if is_narrow else _PIPE_WIDTH, stderr=stderr, emoji=False)


out = _console(sys.stdout)
err = _console(sys.stderr, stderr=True)


@contextmanager
def progress(title: str, *columns: ProgressColumn, **task: Any) -> Iterator[Callable[..., None]]:
    """Show on a terminal how much is done. Yield rich's `Progress.update` for this task.

    `columns`: what stands behind the bar. `task`: options of rich's `add_task`; by default the total is not known.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), *columns)
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as shown:
        yield partial(shown.update, shown.add_task(title, **{"total": None, **task}))


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


def print_json(answer: JsonObject) -> None:
    """Print the answer of the server for scripts."""
    typer.echo(json.dumps(answer, indent=2, ensure_ascii=False))


def say(text: str) -> None:
    """Print a line for people as it is, however long."""
    write(f"{text}\n")


def write(text: str) -> None:
    """Print a part of a text as it is. Rich would change tabs and break long lines."""
    out.file.write(show_controls(text))
    out.file.flush()


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


def fail(problem: str | Exception) -> NoReturn:
    """Print an error and exit with code 1."""
    show_error(problem if isinstance(problem, str) else describe_problem(problem))
    raise typer.Exit(1)
