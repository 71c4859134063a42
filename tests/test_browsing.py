from __future__ import annotations

import asyncio
import socket
from urllib.parse import urlsplit

from tests.browsing import LoopThread, address_of
from tests.deployments.app_fakes import Served, serve_plainly


def test_an_address_accepts_connections_as_soon_as_it_is_known() -> None:
    """A client in another thread may connect before the server's loop runs again."""

    async def connect() -> None:
        async with address_of(serve_plainly()) as address:
            place = urlsplit(address)
            socket.create_connection((place.hostname or "", place.port or 0), timeout=5).close()

    asyncio.run(connect())


def test_the_tasks_of_an_ingress_end_before_its_loop() -> None:
    """Python prints an error for a task that is destroyed while it waits."""

    async def serve() -> Served:
        served = serve_plainly()
        await served.services.preload.wait()
        return served

    thread = LoopThread("a server")
    served = thread.run(serve())
    expiring = served.ingress._expiring
    thread.close()
    assert expiring.cancelled()
