"""How the commands talk to the server, and to who typed them."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any, NoReturn

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

out = Console()
err = Console(stderr=True)

Url = Annotated[str, typer.Option("--url", help="the server to talk to")]
DEFAULT_URL = "http://127.0.0.1:8000"
_ANSWER_TIMEOUT_S = 300.0


KEY_VARIABLE = "LORARETRIEVER_KEY"
Key = Annotated[str | None, typer.Option("--key", envvar=KEY_VARIABLE, help="the key to ask and publish with")]
_key: ContextVar[str | None] = ContextVar("key", default=None)  # given once, before the command's name


@contextmanager
def client_of(url: str, timeout_s: float | None = _ANSWER_TIMEOUT_S) -> Iterator[httpx.Client]:
    """A client of the server; when it cannot be reached, the command ends and says so."""
    try:
        with httpx.Client(base_url=url, timeout=timeout_s, headers=_authorization()) as client:
            yield client
    except httpx.ConnectError:
        fail(f"no server answers at {url}; start one with `loraretriever serve`")
    except (httpx.TransportError, httpx.InvalidURL) as exc:
        fail(f"{url}: {exc or type(exc).__name__}")


def use_key(key: str | None) -> None:
    """The requests of this command carry this key."""
    _key.set(key)


def has_key() -> bool:
    """Return whether the requests of this command carry a key."""
    return _key.get() is not None


def _authorization() -> dict[str, str]:
    key = _key.get()
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def call(url: str, method: str, path: str, **request: Any) -> dict[str, Any]:
    """The server's JSON answer; a refusal ends the command with the server's words."""
    with client_of(url) as client:
        response = client.request(method, path, **request)
        check(response)
        answer: dict[str, Any] = response.json()
        return answer


def follow(url: str, path: str, body: dict[str, Any], what: str) -> dict[str, Any]:
    """The result of a POST that answers with progress, one JSON object a line; an error ends the command."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with client_of(url, timeout_s=None) as client, client.stream("POST", path, json=body) as response:
        check(response)
        with Progress(*columns, console=err, transient=True) as progress:
            task = progress.add_task(what, total=None)
            for line in map(json.loads, response.iter_lines()):
                if "error" in line:
                    fail(line["error"]["message"])
                if "result" in line:
                    result: dict[str, Any] = line["result"]
                    return result
                progress.update(task, completed=line["done"], total=line["total"])
    fail("the server broke off before it was done")


def check(response: httpx.Response) -> None:
    if response.is_error:
        response.read()
        fail(message_of(response))


def message_of(response: httpx.Response) -> str:
    """What the server says of a refused request."""
    try:
        message: str = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the server answered {response.status_code}"
    return message


def fail(message: str) -> NoReturn:
    err.print(message, style="red", markup=False, soft_wrap=True)
    raise typer.Exit(1)


def is_this_machine(url: str) -> bool:
    """Whether the server shares this machine's files, as far as its address tells."""
    host = httpx.URL(url).host
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
