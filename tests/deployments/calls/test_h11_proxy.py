from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.h11_impl import H11Protocol

from deployments.api.error_table import HTTP_ERROR, RETRIED, STATUSES
from deployments.calls import h11_proxy
from deployments.calls.h11_proxy import (
    CALLBACK,
    CALLBACK_VARIABLE,
    TrustedHeaders,
    bound_headers,
    make_counting_key,
    warn_if_unbounded,
)
from deployments.calls.proxy_limits import SAMPLING_VARIABLE, TRACING_VARIABLE, ProxyLimits
from deployments.errors import BodyTooSlow, RateLimited
from lora_store.error_kinds import ReportedError
from tests.deployments.proxy_server import Timers, connect, hello, let_arrive, server_of

GOOD = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(HTTP_PROTOCOLS, "auto", HTTP_PROTOCOLS["auto"])
    [middleware] = bound_headers()
    assert str(middleware.cls) == str(TrustedHeaders)
    yield


async def answer_to(*pieces: bytes) -> bytes:
    """Return what a server configured like Serve's answers to these bytes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(hello, log_level="critical", lifespan="off"))
        serving = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0)
        try:
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.writelines(pieces)
            return await reader.read()
        finally:
            server.should_exit = server.force_exit = True
            await serving


def test_the_callback_is_found_by_its_path() -> None:
    module, _, name = CALLBACK.partition(":")
    assert module == h11_proxy.__name__
    assert getattr(h11_proxy, name) is bound_headers


def test_a_uvicorn_that_takes_another_protocol_ends_the_start_of_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    load = uvicorn.Config.load

    def load_own(config: uvicorn.Config) -> None:
        load(config)
        config.http_protocol_class = H11Protocol

    monkeypatch.setattr(uvicorn.Config, "load", load_own)
    with pytest.raises(ImportError, match=r"uvicorn \S+ parses requests by H11Protocol, without .* limits on connecti"):
        bound_headers()


def test_a_node_without_the_callback_is_reported_with_the_remedy(caplog: pytest.LogCaptureFixture) -> None:
    warn_if_unbounded({CALLBACK_VARIABLE: CALLBACK})
    assert caplog.messages == []
    warn_if_unbounded({})
    [message] = caplog.messages
    assert "limits no connections on this node" in message and f"{CALLBACK_VARIABLE}={CALLBACK}" in message


CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"


async def test_a_request_of_common_size_is_answered() -> None:
    answer = await answer_to(GOOD, b"X-A: ", b"a" * 8000, b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")


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
async def test_oversized_parts_around_a_body_are_refused_before_they_end(pieces: tuple[bytes, ...]) -> None:
    """None of these ends: without a limit the server would wait for more."""
    check_400(await answer_to(*pieces))


def check_400(answer: bytes) -> None:
    """Check that the request was refused with the error object of the API."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"application/json" in head
    assert json.loads(body)["error"]["code"] == HTTP_ERROR


@pytest.mark.parametrize(
    "sent",
    [
        GOOD + b"X-A: " + b"a" * 17_000 + b"\r\n\r\n",
        GOOD + b"".join(b"X-%d: a\r\n" % number for number in range(1700)) + b"\r\n",
        b"GET /" + b"a" * 17_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        CHUNKED + b"1\r\na\r\n0\r\nX-A: " + b"a" * 17_000 + b"\r\n\r\n",
    ],
    ids=["a header", "many headers", "an address", "a trailer"],
)
async def test_oversized_parts_that_arrive_at_once_are_refused(sent: bytes) -> None:
    check_400(await answer_to(sent))


async def test_what_is_not_http_is_refused_with_an_api_error() -> None:
    check_400(await answer_to(b"hello\r\n\r\n"))
    check_400(await answer_to(CHUNKED, b"not a length\r\n"))


async def test_an_answer_that_has_begun_is_cut_off_if_the_rest_of_its_request_is_not_http() -> None:
    async def answer_early(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass

    async with server_of(ProxyLimits(), app=answer_early) as (port, _):
        reader, writer = await connect(port)
        writer.write(CHUNKED)
        begun = await reader.readuntil(b"begun\r\n")
        writer.write(b"not a length\r\n")
        assert begun.startswith(b"HTTP/1.1 200 ") and await reader.read() == b""


def check_refusal(answer: bytes, error: type[ReportedError]) -> None:
    """Check that the answer is what the application would answer to this error, but for its text."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert error.kind is not None
    status, type_ = STATUSES[error.kind]
    assert head.startswith(b"HTTP/1.1 %d " % status) and b"application/json" in head
    assert re.search(rb"\r\nx-request-id: [0-9a-f]{32}\r\n", head)
    assert (b"\r\nretry-after: " in head) == (status in RETRIED)
    found = json.loads(body)["error"]
    assert (found["type"], found["code"]) == (type_, error.code)


@pytest.mark.parametrize("start", [b"G", b"GET / HTTP/1.1\r\nHost: x\r\n"])
async def test_a_head_that_is_not_complete_in_time_is_refused(start: bytes) -> None:
    async with server_of(ProxyLimits(head_timeout_s=10), timers=(timers := Timers())) as (port, book):
        reader, writer = await connect(port)
        writer.write(start)
        for _ in range(9):
            await timers.advance(1)
            writer.write(b"X: y\r\n" if start.endswith(b"x\r\n") else b"")
        assert book.num_connections == 1
        await timers.advance(1)
        answer = await reader.read()
        await let_arrive()
        assert book.num_connections == 0
    check_refusal(answer, BodyTooSlow)


async def test_a_connection_without_a_byte_is_closed_silently() -> None:
    async with server_of(ProxyLimits(head_timeout_s=10), timers=(timers := Timers())) as (port, book):
        reader, _ = await connect(port)
        await timers.advance(9)
        assert book.num_connections == 1
        await timers.advance(1)
        assert await reader.read() == b""


async def test_a_connection_may_be_idle_after_an_answer_and_its_next_head_has_a_deadline() -> None:
    limits, timers = ProxyLimits(head_timeout_s=10), Timers()
    async with server_of(limits, timers=timers, timeout_keep_alive=30) as (port, _):
        reader, writer = await connect(port)
        for pause_s in (0, 25):
            await timers.advance(pause_s)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = await reader.readuntil(b"hello")
        writer.write(b"GET / HT")
        await timers.advance(0)
        await timers.advance(10)
        late = await reader.read()
    assert answer.startswith(b"HTTP/1.1 200")
    check_refusal(late, BodyTooSlow)


async def test_a_partial_head_after_a_request_has_a_deadline_too() -> None:
    limits, timers = ProxyLimits(head_timeout_s=10), Timers()
    async with server_of(limits, timers=timers, timeout_keep_alive=30) as (port, _):
        reader, writer = await connect(port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HT")
        answer = await reader.readuntil(b"hello")
        await timers.advance(10)
        answer += await reader.read()
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"hello")


async def test_a_body_may_take_longer_than_a_head() -> None:
    async with server_of(ProxyLimits(head_timeout_s=10), timers=(timers := Timers())) as (port, _):
        reader, writer = await connect(port)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\na")
        await timers.advance(40)
        writer.write(b"b")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")


async def ask(port: int, address: str = "127.0.0.1") -> bytes:
    reader, writer = await connect(port, address)
    writer.write(GOOD + b"\r\n")
    return await reader.read()


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2"], ids=["of the same address", "of another"])
async def test_half_open_connections_do_not_block_other_requests(address: str) -> None:
    """The process may open few files, and the slow clients would use far more. Their deadline does not help here."""
    async with server_of(ProxyLimits(head_timeout_s=60, connections_per_address=20)) as (port, book):
        slow = []
        for _ in range(60):
            slow.append(await connect(port))
            slow[-1][1].write(b"GET / HTTP/1.1\r\nX-A: ")
            await asyncio.sleep(0)
        answers = [await ask(port, address) for _ in range(3)]
        assert book.num_connections <= 20
        for _, writer in slow:
            writer.close()
    assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)


async def test_with_all_connections_of_an_address_busy_one_more_is_refused() -> None:
    async with server_of(ProxyLimits(connections_per_address=3)) as (port, book):
        busy = [await connect(port) for _ in range(3)]
        for _, writer in busy:
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1\r\n\r\n")
        while book.num_connections < 3 or book._waiting:
            await asyncio.sleep(0.01)
        reader, _ = await connect(port)
        answer = await reader.read()
        check_refusal(answer, RateLimited)
        assert (await ask(port, "127.0.0.3")).startswith(b"HTTP/1.1 200")
        for reader, writer in busy:
            writer.write(b"x")
            assert (await reader.read()).startswith(b"HTTP/1.1 200")
        while book.num_connections:
            await asyncio.sleep(0.01)
        assert (await ask(port)).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("client", "address"),
    [
        (("192.0.2.7", 1), "192.0.2.7"),
        (("::ffff:192.0.2.7", 1), "192.0.2.7"),
        (("2001:db8:1:2:3:4:5:6", 1), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 1), "fe80::/64"),
        (("somewhere", 1), "somewhere"),
        (None, ""),
    ],
)
def test_connections_are_counted_by_customer(client: tuple[str, int] | None, address: str) -> None:
    assert make_counting_key(client) == address


def passed_on(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return which headers the middleware of Serve's proxy passes on."""
    seen: list[tuple[bytes, bytes]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(scope["headers"])

    [middleware] = bound_headers()
    built: Any = middleware.cls(app, *middleware.args, **middleware.kwargs)
    asyncio.run(built({"type": "http", "headers": headers}, None, None))
    return seen


def test_a_client_does_not_decide_what_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    headers = [(b"host", b"x"), (b"traceparent", b"00-" + b"a" * 32 + b"-bbbbbbbbbbbbbbbb-01"), (b"Tracestate", b"a=b")]
    assert passed_on(headers) == [(b"host", b"x")] and len(headers) == 3
    monkeypatch.setenv(TRACING_VARIABLE, "a:b")
    monkeypatch.setenv(SAMPLING_VARIABLE, "0")
    assert passed_on(headers) == headers


@pytest.mark.parametrize("given", [b"req:42", b"Root=1-67891233", b"a" * 65, b"two words", b"\xe9", b""])
def test_a_client_names_a_request_with_a_plain_id_only(given: bytes) -> None:
    headers = [(b"host", b"x"), (b"X-Request-Id", given)]
    assert passed_on(headers) == headers[:1]
    headers[1] = (b"x-request-id", b"5dba8b27-e6c9")
    assert passed_on(headers) == headers
