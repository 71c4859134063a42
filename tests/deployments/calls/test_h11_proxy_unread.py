"""Clients that do not read their answers, or whose requests are answered before their bodies end."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

from deployments.calls.proxy_limits import ProxyLimits
from tests.deployments.proxy_server import Timers, connect, let_arrive, server_of

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
LARGE = b"x" * (16 << 20)  # more than the kernel buffers for a client that does not read


async def large(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-length", str(len(LARGE)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": LARGE})


async def in_pieces(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for at in range(0, len(LARGE), 1 << 20):
        await send({"type": "http.response.body", "body": LARGE[at : at + (1 << 20)], "more_body": True})
    await send({"type": "http.response.body"})


def num_files() -> int:
    """Return the number of this process's open files, without those that only garbage holds."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def unread(port: int, request: bytes) -> socket.socket:
    """Send a request from a socket whose answer is never read."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect(("127.0.0.1", port))
    client.sendall(request)
    return client


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.01)


async def test_clients_that_do_not_read_have_at_most_the_allowed_connections() -> None:
    limits = ProxyLimits(head_timeout_s=60, connections_per_address=3)
    async with server_of(limits, large, timeout_keep_alive=60) as (port, book):
        before, clients = num_files(), []
        for _ in range(5):
            clients.append(unread(port, GET))
            await asyncio.sleep(0.1)
        await until(lambda: num_files() - before - len(clients) == book.num_connections == 3)
        for client in clients:
            client.close()


@pytest.mark.parametrize(
    ("app", "request_"),
    [
        (large, GET),
        (large, GET + b"GET"),
        (large, GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")),
        (in_pieces, GET),
    ],
    ids=["idle", "a late head behind it", "the last answer", "an answer in pieces"],
)
async def test_a_client_that_does_not_read_is_disconnected(app: Any, request_: bytes) -> None:
    limits = ProxyLimits(head_timeout_s=10, unread_timeout_s=60)
    async with server_of(limits, app, timers=(timers := Timers()), timeout_keep_alive=1) as (port, book):
        before, client = num_files(), unread(port, request_)
        await until(lambda: book.num_connections == 1)
        await until(lambda: timers.num_waiting > 0)
        for _ in range(3):  # a read restarts the time for the rest
            await timers.advance(60)
        await until(lambda: book.num_connections == 0)
        await until(lambda: num_files() == before + 1)
        client.close()


async def test_a_client_that_reads_slowly_gets_its_whole_answer() -> None:
    timers = Timers()
    async with server_of(ProxyLimits(unread_timeout_s=60), large, timers=timers, timeout_keep_alive=1) as (port, _):
        reader, writer = await connect(port)
        writer.write(GET)
        num_bytes = 0
        while piece := await reader.read(1 << 20):
            num_bytes += len(piece)
            await timers.advance(1)
        assert num_bytes > len(LARGE)


POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nx"


async def refuse(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"no"})


async def answered_early(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await connect(port)
    writer.write(POST)
    assert (await reader.readuntil(b"\r\n\r\nno")).startswith(b"HTTP/1.1 401")
    return reader, writer


@pytest.mark.parametrize("more", [b"", b"y"], ids=["silent", "trickling"])
async def test_a_body_that_continues_after_the_answer_has_a_deadline(more: bytes) -> None:
    limits, timers = ProxyLimits(head_timeout_s=10), Timers()
    async with server_of(limits, refuse, timers=timers, timeout_keep_alive=60) as (port, book):
        _, writer = await answered_early(port)
        for _ in range(9):
            writer.write(more)
            await timers.advance(1)
        assert book.num_connections == 1
        await timers.advance(1)
        await until(lambda: book.num_connections == 0)


async def test_a_connection_that_was_answered_early_makes_room_for_another() -> None:
    limits = ProxyLimits(head_timeout_s=60, connections_per_address=3)
    async with server_of(limits, refuse, timeout_keep_alive=60) as (port, book):
        clients = []  # a reader without references closes its connection
        for _ in range(6):
            clients.append(await answered_early(port))
            clients[-1][1].write(b"y")
            await let_arrive()
        assert book.num_connections == 3


async def test_a_client_that_sends_its_whole_body_reads_the_early_answer_and_asks_again() -> None:
    async with server_of(ProxyLimits(head_timeout_s=5), refuse, timeout_keep_alive=60) as (port, _):
        reader, writer = await connect(port)
        writer.write(POST)
        await let_arrive()
        writer.write(b"x" * 999_999)
        await writer.drain()
        writer.write(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert (await reader.read()).count(b"HTTP/1.1 401") == 2


async def test_a_request_in_progress_behind_another_has_no_deadline_for_its_body() -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await refuse(scope, receive, send)

    limits, timers = ProxyLimits(head_timeout_s=10), Timers()
    async with server_of(limits, slow, timers=timers, timeout_keep_alive=60) as (port, _):
        reader, writer = await connect(port)
        writer.write(GET + POST)
        await timers.advance(50)
        writer.write(b"x" * 999_999)
        assert (await reader.readuntil(b"no") + await reader.readuntil(b"no")).count(b"HTTP/1.1 401") == 2
