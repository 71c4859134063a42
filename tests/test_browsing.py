from __future__ import annotations

import asyncio
import socket
from urllib.parse import urlsplit

from tests.browsing import address_of
from tests.deployments.app_fakes import serve_plainly


def test_an_address_accepts_connections_as_soon_as_it_is_known() -> None:
    """A client in another thread may connect before the server's loop runs again."""

    async def connect() -> None:
        async with address_of(serve_plainly()) as address:
            place = urlsplit(address)
            socket.create_connection((place.hostname or "", place.port or 0), timeout=5).close()

    asyncio.run(connect())
