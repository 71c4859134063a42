"""One server for all clients: the HTTP application over fakes, on loopback. Its answers follow formats and tools."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import httpx
import pytest

from tests.browsing import address_of
from tests.clients.following_worker import FollowingWorker
from tests.deployments.app_fakes import serve_plainly

_START_TIMEOUT_S = 60.0


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """The base URL that a client of the OpenAI API is given."""
    started: Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        ended = asyncio.Event()
        async with address_of(serve_plainly(worker=FollowingWorker(), allowed_hosts=())) as address:
            started.set_result((address, asyncio.get_running_loop(), ended))
            await ended.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="server of clients")
    thread.start()
    address, loop, ended = started.result(_START_TIMEOUT_S)
    yield f"{address}v1"
    loop.call_soon_threadsafe(ended.set)
    thread.join(_START_TIMEOUT_S)
    assert not thread.is_alive()


@pytest.fixture
def model_name(server_url: str) -> Iterator[str]:
    """A model name, like that of another vendor's model, whose policy answers with the adapter `coder` alone."""
    url = f"{server_url}/names/vendor-model-1"
    assert httpx.put(url, json={"model": "coder", "max_tokens": 9}).status_code == 200
    yield "vendor-model-1"
    assert httpx.delete(url).status_code == 200
