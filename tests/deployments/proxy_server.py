"""A server with the HTTP protocol of the proxy, on loopback."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from deployments.calls.h11_proxy import AddressBook, protocol_within
from deployments.calls.proxy_limits import ProxyLimits


async def hello(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


class Timer(asyncio.TimerHandle):
    """A timer of `Timers`; the event loop does not know it."""

    def __init__(self, when: float, act: Callable[[], None]) -> None:
        super().__init__(when, act, (), asyncio.get_running_loop())


class Timers:
    """The timers of a server's connections. Time passes only in `advance`."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._waiting: list[Timer] = []

    def start(self, seconds: float, act: Callable[[], None]) -> Timer:
        self._waiting.append(Timer(self._now_s + seconds, act))
        return self._waiting[-1]

    @property
    def num_waiting(self) -> int:
        return sum(not timer.cancelled() for timer in self._waiting)

    async def advance(self, seconds: float) -> None:
        """Let the server read what has arrived, then let this time pass."""
        await let_arrive()
        self._now_s += seconds
        due = [timer for timer in self._waiting if timer.when() <= self._now_s]
        self._waiting = [timer for timer in self._waiting if timer not in due]
        for timer in due:
            if not timer.cancelled():
                timer._run()
        await let_arrive()


async def let_arrive() -> None:
    """Let bytes that were written on loopback reach the other side of this event loop."""
    for _ in range(2):
        for _ in range(20):
            await asyncio.sleep(0)
        await asyncio.sleep(0.002)  # some systems deliver them on another thread


@asynccontextmanager
async def server_of(
    limits: ProxyLimits, app: Any = hello, *, timers: Timers | None = None, **settings: Any
) -> AsyncIterator[tuple[int, AddressBook]]:
    """Return the port of a server with these limits, and its address book. Its timers run by `timers`, if given."""
    protocol = protocol_within(limits)
    if timers is not None:
        protocol.start_timer = staticmethod(timers.start)  # type: ignore[method-assign,assignment]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="critical", lifespan="off", http=protocol, backlog=1024, **settings)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0)
        try:
            yield listener.getsockname()[1], protocol.book
        finally:
            server.should_exit = server.force_exit = True
            await serving


async def connect(port: int, address: str = "127.0.0.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
