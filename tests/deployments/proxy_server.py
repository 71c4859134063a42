"""A server with the HTTP protocol of the proxy, on loopback."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from deployments.calls.h11_proxy import (
    AddressBook,
    protocol_within,
)
from deployments.calls.proxy_limits import ProxyLimits


async def hello(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


@asynccontextmanager
async def server_of(limits: ProxyLimits, app: Any = hello, **settings: Any) -> AsyncIterator[tuple[int, AddressBook]]:
    """Return the port of a server with these limits, and its address book."""
    protocol = protocol_within(limits)
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
