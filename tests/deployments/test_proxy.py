from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from uvicorn.config import HTTP_PROTOCOLS

from deployments import proxy
from deployments.proxy import CALLBACK, bound_headers

GOOD = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(HTTP_PROTOCOLS, "auto", HTTP_PROTOCOLS["auto"])
    assert bound_headers() == []
    yield


async def hello(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


async def answer_to(*pieces: bytes) -> bytes:
    """What a server that is configured as Serve configures it says to these bytes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(hello, log_level="critical", lifespan="off"))
        serving = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0)
        try:
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.writelines(pieces)
            return await asyncio.wait_for(reader.read(), 20)
        finally:
            server.should_exit = server.force_exit = True
            await serving


def test_the_callback_is_found_by_its_path() -> None:
    module, _, name = CALLBACK.partition(":")
    assert module == proxy.__name__
    assert getattr(proxy, name) is bound_headers


def test_a_request_of_common_size_is_answered() -> None:
    answer = asyncio.run(answer_to(GOOD, b"X-A: ", b"a" * 8000, b"\r\n\r\n"))
    assert answer.startswith(b"HTTP/1.1 200")


CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        (GOOD, b"X-A: ", b"a" * 20_000),
        (GOOD, b"".join(b"X-%d: a\r\n" % number for number in range(3000))),
        (b"GET /", b"a" * 20_000),
        (CHUNKED, b"1\r\na\r\n0\r\nX-A: ", b"a" * 20_000),
    ],
    ids=["a header", "many headers", "an address", "a trailer"],
)
def test_what_stands_beside_a_body_is_refused_before_it_ends(pieces: tuple[bytes, ...]) -> None:
    """None of these ends: without a bound, the server waits for more."""
    assert asyncio.run(answer_to(*pieces)).startswith(b"HTTP/1.1 400")
