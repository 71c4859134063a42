"""Run a command against a server with scripted answers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from unittest.mock import patch

import typer.testing
from typer.main import get_command
from typer.testing import CliRunner, Result

from deployments.cli.main import cli

COMMAND: Any = get_command(cli)  # built once, which takes longer than most commands, for lines without CHOICES
CHOICES = {"-h", "--help", "--strategy", "--weights"}  # a command fills them in before its first use only
# Status; JSON body, text body, or a function of the JSON that was sent; perhaps headers.
Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]]


@dataclass
class Script:
    """Answers in order, the last one forever, and records the requests."""

    answers: list[Answer]
    url: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)  # method and path
    bodies: list[bytes] = field(default_factory=list)
    content_types: list[str] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)  # of every answer

    @property
    def sent(self) -> list[Any]:
        """Return the JSON bodies received, None for an empty one."""
        return [json.loads(body) if body else None for body in self.bodies]


class _Handler(BaseHTTPRequestHandler):
    script: Script

    def do_GET(self) -> None:
        script = self.script
        script.asked.append((self.command, self.path))
        script.authorizations.append(self.headers.get("authorization"))
        script.content_types.append(self.headers.get("content-type") or "")
        script.bodies.append(self.rfile.read(int(self.headers.get("content-length") or 0)))
        status, body, *more = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
        body = body(json.loads(script.bodies[-1])) if callable(body) else body
        self.send_response(status)
        for name, value in [item for headers in (script.headers, *more) for item in headers.items()]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write((body if isinstance(body, str) else json.dumps(body)).encode())

    do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def log_message(self, *_: object) -> None:
        """Keeps the tests' output clean."""


@contextmanager
def scripted(*answers: Answer) -> Iterator[Script]:
    """Run a server with these answers."""
    script = Script(list(answers))
    handler = type("Handler", (_Handler,), {"script": script})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        script.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield script
        finally:
            http.shutdown()
            thread.join()


def run(*arguments: object, input: str | None = None) -> Result:
    """Run the command and return the outcome. Its error must be a message, no traceback. `input`: the user's input."""
    typed = [str(argument) for argument in arguments]
    with patch.object(typer.testing, "_get_command", get_command if CHOICES & set(typed) else lambda _: COMMAND):
        result = CliRunner().invoke(cli, typed, terminal_width=400, input=input)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


@dataclass(frozen=True)
class Outcome:
    """What a command printed, its words apart from each other by one space, and what it sent to the server."""

    code: int
    out: str
    err: str
    server: Script
    stdout: str  # as it was printed

    @property
    def asked(self) -> list[tuple[str, str]]:
        return self.server.asked

    @property
    def sent(self) -> list[Any]:
        return self.server.sent

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


def run_with(answers: Any, *arguments: object, input: str | None = None) -> Outcome:
    """Run the command against a server with these answers: one body of status 200, one answer, or a list of answers."""
    several = answers if isinstance(answers, list) else [answers]
    with scripted(*(answer if isinstance(answer, tuple) else (200, answer) for answer in several)) as server:
        url = ["--url", server.url] if "--" not in arguments else []
        result = run(*arguments, *url, input=input)
    return Outcome(result.exit_code, words(result.stdout), words(result.stderr), server, result.stdout)


def run_alone(packages: Sequence[str], *commands: Sequence[object]) -> list[tuple[int, str, str, list[str]]]:
    """Run commands in one process. Return each status, stdout and stderr, and the packages imported until then."""
    script = f"""if True:
        import contextlib, io, json, sys
        from deployments.cli.main import cli
        for command in json.loads(sys.argv[1]):
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    cli(command)
                except SystemExit as end:
                    code = end.code
            imported = [name for name in {packages!r} if name in sys.modules]
            print(json.dumps([code, out.getvalue().strip(), err.getvalue().strip(), imported]))
    """
    lines = json.dumps([list(map(str, command)) for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", script, lines], capture_output=True, text=True, check=True, timeout=300
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def words(text: str) -> str:
    return " ".join(text.split())


def lines(*objects: dict[str, Any]) -> str:
    return "".join(f"{json.dumps(line)}\n" for line in objects)


def refusal(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}
