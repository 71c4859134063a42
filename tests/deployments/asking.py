"""Send one request to the routes of an Ingress over fakes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from tests.deployments.app_fakes import Served, http_of, serve_plainly


@asynccontextmanager
async def asked(
    *, host: str = "127.0.0.1", headers: dict[str, str] | None = None, **options: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, Served]]:
    """Yield a client after the preload; afterwards wait for background work."""
    served = serve_plainly(**options)
    await served.services.preload.wait()
    async with http_of(served, host=host, headers=headers or {}) as client:
        yield client, served
    await served.services.background.idle()


def ask(question: Callable[[httpx.AsyncClient, Served], Awaitable[Any]], **options: Any) -> Any:
    """Return the result of `question`."""

    async def run() -> Any:
        async with asked(**options) as (client, served):
            return await question(client, served)

    return asyncio.run(run())


def request(method: str, path: str, *, sent: dict[str, Any] | None = None, **options: Any) -> httpx.Response:
    """Return the response to one request. `sent`: arguments of httpx's `request` except method and path."""
    response: httpx.Response = ask(lambda client, _: client.request(method, path, **(sent or {})), **options)
    return response


def post(path: str, body: Any, **options: Any) -> httpx.Response:
    return request("POST", path, sent={"json": body}, **options)


def get(path: str, **options: Any) -> httpx.Response:
    return request("GET", path, **options)


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def lines_of(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the JSON lines of a response that reports its progress."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in response.text.splitlines()]


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the chunks of a stream that ended."""
    *events, done = response.text.rstrip("\n").split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]
