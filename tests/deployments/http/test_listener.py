"""The Ingress's own listener does what Serve's proxy does: limits, request ids, clients that leave."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from deployments.calls.proxy_limits import ProxyLimits
from deployments.http.listener import Listener, listening_at
from tests.deployments.app_fakes import app_of, serve_plainly
from tests.deployments.held_worker import CHAT

Asgi = Callable[..., Awaitable[None]]


@asynccontextmanager
async def listening(
    app: Asgi, limits: ProxyLimits | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of a listener over this application."""
    listener = Listener(app, await listening_at(host, 0), limits)
    listener.start()
    async with httpx.AsyncClient(
        base_url=httpx.URL(scheme="http", host=host, port=listener.port), timeout=120
    ) as client:
        yield client
    await asyncio.wait_for(listener.stopped(), 120)


async def body_of(receive: Any) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        assert message["type"] == "http.request"
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the request's body in upper case, in two parts."""
    body = await body_of(receive)
    names = b" ".join(sorted(name for name, _ in scope["headers"] if name.startswith(b"trace")))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-seen", names)]})
    await send({"type": "http.response.body", "body": body.upper(), "more_body": True})
    await send({"type": "http.response.body", "body": b"!"})


async def test_requests_of_one_connection_are_answered_with_their_ids() -> None:
    async with listening(echo) as client:
        for text in ("one", "two", "x" * 300_000):
            answer = await client.post("/", content=text, headers={"x-request-id": f"id-{len(text)}"})
            assert answer.text == text.upper() + "!" and answer.status_code == 200
            assert answer.headers.get_list("x-request-id") == [f"id-{len(text)}"]
        assert "x-request-id" not in (await client.post("/")).headers, "the application makes one"


@pytest.mark.parametrize("given", ["5dba8b27-e6c9", "req:42", "Root=1-67891233", "a" * 65, "two words", ""])
async def test_an_answer_has_one_id_whatever_the_client_sent(given: str) -> None:
    served = serve_plainly()
    async with listening(app_of(served)) as client:
        for path in ("/v1/chat/completions", "/v1/messages"):
            answer = await client.post(path, json=CHAT | {"max_tokens": 9}, headers={"x-request-id": given})
            [found] = answer.headers.get_list("x-request-id")
            assert answer.json()["id"].removeprefix("chatcmpl-").removeprefix("msg_") == found
            assert found == given if given.startswith("5dba") else len(found) == 32


@pytest.mark.parametrize(("trusts", "seen"), [(False, ""), (True, "traceparent tracestate")])
async def test_a_client_decides_what_is_traced_only_if_it_may(trusts: bool, seen: str) -> None:
    async with listening(echo, ProxyLimits(trusts_traceparent=trusts)) as client:
        answer = await client.get("/", headers={"traceparent": "00-1-1-01", "tracestate": "a=b"})
        assert answer.headers["x-seen"] == seen


async def test_health_is_answered_as_by_the_proxy() -> None:
    async with listening(echo) as client:
        answer = await client.get("/-/healthz")
        assert (answer.status_code, answer.text) == (200, "success")


async def raw(client: httpx.AsyncClient, text: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send this text to the client's server over a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    writer.write(text)
    return reader, writer


async def test_connections_and_heads_have_the_proxys_limits() -> None:
    async with listening(echo, ProxyLimits(connections_per_address=1)) as client:
        reader, writer = await raw(client, b"GET / HTTP/1.1\r\nx: " + b"a" * 17_000)
        assert (await asyncio.wait_for(reader.readline(), 120)).startswith(b"HTTP/1.1 400")
        writer.close()
        begun = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n"
        first, second = await raw(client, begun), await raw(client, begun)
        assert (await asyncio.wait_for(second[0].readline(), 120)).startswith(b"HTTP/1.1 429")
        first[1].write(b"after")
        assert (await asyncio.wait_for(first[0].readuntil(b"!"), 120)).startswith(b"HTTP/1.1 200")
        first[1].close()
        second[1].close()


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_request_whose_client_leaves_is_cancelled(is_streamed: bool) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await body_of(receive)
        if is_streamed:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with listening(slow) as client:
        asking = asyncio.create_task(client.post("/", content="text"))
        await asyncio.wait_for(began.wait(), 120)
        assert not ended.is_set()
        asking.cancel()
        await asyncio.wait_for(ended.wait(), 120)


async def test_a_client_that_closes_only_its_own_side_counts_as_one_that_has_left() -> None:
    ended = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with listening(slow) as client:
        reader, writer = await raw(client, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 120) == b""
        await asyncio.wait_for(ended.wait(), 120)
        writer.close()


async def test_an_application_that_ends_before_the_body_is_answered() -> None:
    """The body is larger than all buffers, so its rest stays with the client."""

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 413, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": b"too long"})

    async with listening(refuse) as client:
        head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100000000\r\n\r\n"
        reader, writer = await raw(client, head + b"a" * 200_000)
        answer = await asyncio.wait_for(reader.readuntil(b"too long"), 120)
        assert answer.startswith(b"HTTP/1.1 413")
        writer.close()


async def test_work_after_the_answer_is_finished() -> None:
    may_finish, finished = asyncio.Event(), asyncio.Event()

    async def working(scope: Any, receive: Any, send: Any) -> None:
        await echo(scope, receive, send)
        await may_finish.wait()
        finished.set()

    async with listening(working) as client:
        answer = await client.post("/", content="a", headers={"connection": "close"})
        assert answer.text == "A!" and not finished.is_set()
        may_finish.set()
        await asyncio.wait_for(finished.wait(), 120)


async def test_an_error_is_answered_and_the_next_request_too(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("uvicorn", "uvicorn.error"):  # servers of other tests silence them
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    caplog.set_level(logging.ERROR, logger="uvicorn.error")

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/bad":
            raise ValueError("broken here")
        await echo(scope, receive, send)

    async with listening(broken) as client:
        assert (await client.get("/bad")).status_code == 500
        assert (await client.post("/", content="a")).text == "A!"
    assert "broken here" in caplog.text


async def test_an_address_is_free_again_at_once_after_its_listener_has_stopped() -> None:
    """Connections that a listener closes would keep its address busy for a minute."""
    port = 0
    for text in ("a", "b"):
        listener = Listener(echo, await listening_at("127.0.0.1", port, within_s=0))
        listener.start()
        port = listener.port
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            answer = await client.post("/", content=text, headers={"connection": "close"})
            assert answer.text == f"{text.upper()}!"
        await asyncio.wait_for(listener.stopped(), 120)


async def test_requests_in_progress_are_answered_before_a_listener_has_stopped() -> None:
    began, may_answer = asyncio.Event(), asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        began.set()
        await may_answer.wait()
        await echo(scope, receive, send)

    listener = Listener(slow, await listening_at("127.0.0.1", 0))
    assert await listener.stopped(), "it had not started"
    listener = Listener(slow, await listening_at("127.0.0.1", 0))
    listener.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.port}", timeout=120) as client:
        asking = asyncio.create_task(client.post("/", content="a"))
        await asyncio.wait_for(began.wait(), 120)
        assert not await listener.stopped(within_s=0.5)
        with pytest.raises(ConnectionRefusedError):
            await raw(client, b"")
        may_answer.set()
        assert await listener.stopped(within_s=120)
        assert (await asking).text == "A!" and not listener.has_failed


async def test_a_listener_waits_until_an_earlier_one_has_left_its_address() -> None:
    earlier = await listening_at("127.0.0.1", 0)
    port = earlier.getsockname()[1]
    with pytest.raises(OSError, match="in use"):
        await listening_at("127.0.0.1", port, within_s=0)
    waiting = asyncio.create_task(listening_at("127.0.0.1", port))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    earlier.close()
    (await asyncio.wait_for(waiting, 120)).close()
    with pytest.raises(OSError, match="assign"):
        await asyncio.wait_for(listening_at("192.0.2.1", 0), 120)


async def test_an_address_may_be_ipv6() -> None:
    try:
        with socket.socket(socket.AF_INET6) as tried:
            tried.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    async with listening(echo, host="::1") as client:
        assert (await client.post("/", content="a")).text == "A!"


async def test_an_unread_body_stays_with_its_client() -> None:
    may_read = asyncio.Event()

    async def late(scope: Any, receive: Any, send: Any) -> None:
        await may_read.wait()
        await echo(scope, receive, send)

    async with listening(late) as client:
        size = 30_000_000
        head = f"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: {size}\r\n\r\n".encode()
        reader, writer = await raw(client, head + b"a" * size)
        await asyncio.sleep(0.5)
        assert writer.transport.get_write_buffer_size() > size / 2
        may_read.set()
        assert (await asyncio.wait_for(reader.readline(), 60)).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_a_listener_that_ends_by_itself_has_failed(caplog: pytest.LogCaptureFixture) -> None:
    listening_socket = await listening_at("127.0.0.1", 0)
    listener = Listener(echo, listening_socket)
    assert not listener.has_failed
    listening_socket.close()  # so that it cannot be served
    listener.start()
    await asyncio.wait_for(listener.ended(), 120)
    assert listener.has_failed
    working = Listener(echo, await listening_at("127.0.0.1", 0))
    working.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{working.port}") as client:
        assert (await client.post("/", content="a")).text == "A!"
    assert not working.has_failed
    await asyncio.wait_for(working.stopped(), 120)
    assert not working.has_failed
    assert "the HTTP listener has failed" in caplog.text
