"""The HTTP client of the commands, and the ports of this machine."""

from __future__ import annotations

import errno
import json
import random
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import httpx
from rich.progress import MofNCompleteColumn

from deployments.addresses import is_loopback_host
from deployments.cli.options import KEY_VARIABLE, URL_VARIABLE, find_key, name_options, use_key
from deployments.cli.output import err, fail, progress
from deployments.json_types import JsonObject

REMEDY = f"start `loraretriever serve`, or set its address with --url or {URL_VARIABLE}"
_ANSWER_TIMEOUT_S = 300.0
_PROBE_TIMEOUT_S = 5.0
_UNAUTHORIZED = 401
_MAX_WAIT_S = 60.0  # a limit of a key is counted by the minute
_GIVEN_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")  # to connections, from the first to the last
_FIRST_PORT, _TRIED_PORTS = 20_000, 20  # `ray start` uses 10,001 to 19,999


@contextmanager
def open_client(url: str, *, waits: bool = False, remedy: str = REMEDY) -> Iterator[httpx.Client]:
    """Yield an HTTP client. If the server cannot be reached, print why and the remedy, and exit.

    `waits`: an answer may take as long as the server needs.
    """
    timeout = httpx.Timeout(_ANSWER_TIMEOUT_S, read=None if waits else _ANSWER_TIMEOUT_S)
    key, hooks = find_key(), {"response": [_note_ignored_key()]}
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        with httpx.Client(
            base_url=url, timeout=timeout, headers=headers, event_hooks=hooks, mounts=_make_mounts(url)
        ) as client:
            yield client
    except httpx.ConnectError:
        fail(f"no server answers at {url}; {remedy}")
    except (httpx.TransportError, httpx.InvalidURL) as exc:
        fail(f"{url}: {exc or type(exc).__name__}")


def has_key() -> bool:
    """Return whether this command sends a key."""
    return find_key() is not None


def _make_mounts(url: str) -> dict[str, None]:
    """Return the `mounts` of a client that uses the proxy which the environment names, except for this machine."""
    return {"http://": None, "https://": None} if is_this_machine(url) else {}


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
    with open_client(url, waits=method != "GET") as client:
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
    with open_client(url, waits=True) as client, client.stream("POST", path, json=body) as response:
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


def find_param(response: httpx.Response) -> str | None:
    """Return the field that an error response names."""
    try:
        param: str | None = response.json()["error"]["param"]
    except (ValueError, KeyError, TypeError):
        return None
    return param


def find_wait(response: httpx.Response) -> float:
    """Return how many seconds the server asks to wait before the next try, at most a minute; 0 if it does not say."""
    text = response.headers.get("retry-after", "")
    return min(float(text), _MAX_WAIT_S) if re.fullmatch("[0-9]+", text) else 0.0


def lora_path(name: str) -> str:
    """Return the path of an adapter on the server."""
    return f"/v1/loras/{quote(name, safe='')}"


def answers(url: str) -> bool:
    """Return whether anything listens at the address."""
    try:
        with httpx.Client(timeout=_PROBE_TIMEOUT_S, mounts=_make_mounts(url)) as client:
            client.get(f"{url}/health")
    except httpx.ConnectError:
        return False
    except (httpx.TransportError, httpx.InvalidURL):
        return True  # the command itself says what is wrong
    return True


def is_this_machine(url: str) -> bool:
    """Return whether the address is on this machine, so that the server can read its files."""
    return is_loopback_host(httpx.URL(url).host)


def reads_paths(url: str, *, upload: bool) -> bool:
    """Return whether the server reads folders itself. With keys it does not by default."""
    return is_this_machine(url) and not upload and not has_key()


class ServerFailed(Exception):
    """The server could not start."""


def free_port(host: str) -> int:
    """Return a free port of `host`, if possible one that the system gives to no connection.

    Those may be taken before the caller listens: Ray's processes open many connections as they start.
    """
    lowest = int(_GIVEN_PORTS.read_text().split()[0]) if _GIVEN_PORTS.exists() else 0
    others = range(_FIRST_PORT, lowest)
    for port in random.sample(others, min(_TRIED_PORTS, len(others))):
        with suppress(OSError):
            return _bind(host, port)
    return _bind(host, 0)


def _bind(host: str, port: int) -> int:
    """Return the port that a socket gets. Raises: OSError."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, port))
        bound: int = probe.getsockname()[1]
        return bound


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
