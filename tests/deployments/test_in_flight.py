"""What an Ingress replica refuses at once because it has enough to do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from deployments.errors import ServerOverloaded
from deployments.in_flight import InFlight
from gpu_worker.request import Delta, Job
from tests.deployments.adapter_records import BASE
from tests.deployments.app_fakes import Served, http_of, serve_plainly
from tests.deployments.asking import error_of
from tests.deployments.fake_worker import DELTAS, FakeWorker

CHAT = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}]}


class Held(FakeWorker):
    """Answers once the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = asyncio.Event()
        self.num_asked = 0
        self.asked = asyncio.Condition()

    async def stream(self, job: Job) -> AsyncIterator[Delta]:
        async with self.asked:
            self.num_asked += 1
            self.asked.notify_all()
        await self.let_go.wait()
        for delta in DELTAS:
            yield delta

    async def has(self, count: int) -> None:
        async with self.asked:
            await self.asked.wait_for(lambda: self.num_asked == count)


def with_two_held(
    question: Callable[[httpx.AsyncClient, Served], Awaitable[Any]], body: dict[str, Any] | None = None
) -> Any:
    """What `question` gives while two requests fill a replica that takes two."""

    async def run() -> Any:
        worker = Held()
        served = serve_plainly(worker=worker, max_in_flight=2)
        async with http_of(served) as client:
            held = [asyncio.create_task(client.post("/v1/chat/completions", json=body or CHAT)) for _ in range(2)]
            await worker.has(2)
            answer = await question(client, served)
            worker.let_go.set()
            assert [response.status_code for response in await asyncio.gather(*held)] == [200, 200]
        assert served.ingress.in_flight.count == 0
        return answer

    return asyncio.run(asyncio.wait_for(run(), 10))


@pytest.mark.parametrize("streamed", [False, True])
def test_above_the_limit_a_request_is_refused_and_told_to_come_again(streamed: bool) -> None:
    async def question(client: httpx.AsyncClient, served: Served) -> httpx.Response:
        return await client.post("/v1/chat/completions", json=CHAT)

    response = with_two_held(question, CHAT | {"stream": streamed})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    error = error_of(response)
    assert (error["type"], error["code"]) == ("overloaded_error", "server_overloaded")
    assert "2 requests" in error["message"]


def test_of_what_is_refused_not_even_the_body_is_read() -> None:
    read = []

    async def body() -> AsyncIterator[bytes]:
        read.append(True)
        yield b"{}"

    async def question(client: httpx.AsyncClient, served: Served) -> httpx.Response:
        return await client.post("/v1/chat/completions", content=body())

    assert with_two_held(question).status_code == 429
    assert not read


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_a_probe_is_answered_however_much_there_is_to_do(path: str) -> None:
    async def question(client: httpx.AsyncClient, served: Served) -> httpx.Response:
        await served.ingress.preload.wait()
        return await client.get(path)

    assert with_two_held(question).status_code == 200


@pytest.mark.parametrize("path", ["/v1/loras/health", "/v1/models/ready"])
def test_what_only_ends_like_a_probe_is_none(path: str) -> None:
    async def question(client: httpx.AsyncClient, served: Served) -> httpx.Response:
        return await client.get(path)

    assert with_two_held(question).status_code == 429


def test_a_place_is_free_again_after_an_answer_an_error_and_a_client_that_left() -> None:
    async def run() -> None:
        worker = Held()
        served = serve_plainly(worker=worker, max_in_flight=1)
        async with http_of(served) as client:
            leaving = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
            await worker.has(1)
            assert served.ingress.in_flight.count == 1
            leaving.cancel()
            await asyncio.wait([leaving])
            assert served.ingress.in_flight.count == 0
            worker.let_go.set()
            for body, status in [(CHAT, 200), ({}, 400), (CHAT | {"model": "nobody"}, 404), (CHAT, 200)]:
                assert (await client.post("/v1/chat/completions", json=body)).status_code == status
        assert served.ingress.in_flight.count == 0

    asyncio.run(run())


def test_the_count_goes_no_higher_than_the_limit() -> None:
    in_flight = InFlight(1)
    in_flight.enter()
    with pytest.raises(ServerOverloaded):
        in_flight.enter()
    assert in_flight.count == 1
    in_flight.leave()
    in_flight.enter()
