"""A request's deadline: counted from arrival, sent to the Worker, and enforced by the Ingress elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from deployments.generation.row_stream import within
from gpu_worker.errors import DeadlineExceeded, EngineStopped
from gpu_worker.front.request.request import Delta, Job
from retriever_svc import Route, RouteRequest
from tests.deployments.app_fakes import serve_plainly
from tests.deployments.asking import asked, error_of, post
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.fake_worker import DELTAS, FakeWorker

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


class SilentRetriever(FakeRetriever):
    async def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        await asyncio.Event().wait()
        raise AssertionError


@pytest.mark.parametrize(
    ("body", "settings", "limit_s"),
    [
        ({"timeout_s": 200}, {}, 200),
        ({}, {}, 600),
        ({"timeout_s": 1e9}, {"max_request_s": 300}, 300),
        ({}, {"max_request_s": 300}, 300),
    ],
)
async def test_the_worker_gets_the_clients_deadline_limited_by_the_servers(
    body: dict[str, Any], settings: dict[str, Any], limit_s: float
) -> None:
    served = serve_plainly(**settings)
    await served.ingress.generate(CHAT | body)
    assert served.job.time_left_s is not None and limit_s - 100 < served.job.time_left_s <= limit_s


async def test_over_http_the_time_of_the_body_counts() -> None:
    read_at: list[float] = []

    async def slow_body() -> AsyncIterator[bytes]:
        read_at.append(time.monotonic())
        await asyncio.sleep(0.05)
        yield b'{"timeout_s": 20, "messages": [{"role": "user", "content": "Hi"}]}'

    async with asked() as (client, served):
        headers = {"content-type": "application/json"}
        response = await client.post("/v1/chat/completions", content=slow_body(), headers=headers)
        assert response.status_code == 200
    assert served.job.time_left_s <= 20 - 0.05


class Failing(FakeWorker):
    """Fails its first attempt after a while, and records the time left of each."""

    def __init__(self) -> None:
        super().__init__()
        self.times_left: list[float | None] = []

    async def stream(self, job: Job) -> AsyncIterator[Delta]:
        self.times_left.append(job.time_left_s)
        if len(self.times_left) == 1:
            await asyncio.sleep(0.05)
            raise EngineStopped("the engine has stopped")
        for delta in DELTAS:
            yield delta


def test_a_repeated_call_gets_the_remaining_time() -> None:
    worker = Failing()
    assert post("/v1/chat/completions", CHAT | {"timeout_s": 200}, worker=worker).status_code == 200
    first, second = worker.times_left
    assert first is not None and second is not None
    assert 100 < second <= first - 0.05 < 200


@pytest.mark.parametrize("timeout_s", [0, -1, "soon", float("nan"), float("inf")])
async def test_a_timeout_is_a_positive_number(timeout_s: object) -> None:
    with pytest.raises(Exception, match="timeout_s"):
        await serve_plainly().ingress.generate(CHAT | {"timeout_s": timeout_s})


def test_a_retrieval_that_hangs_ends_with_the_request() -> None:
    response = post("/v1/chat/completions", CHAT | {"timeout_s": 0.05}, retriever=SilentRetriever())
    assert response.status_code == 504
    error = error_of(response)
    assert (error["type"], error["code"], error["param"]) == ("timeout_error", "deadline_exceeded", "timeout_s")


def test_a_deadline_enforced_by_the_worker_is_a_504_or_the_last_event() -> None:
    late = FakeWorker([DELTAS[0], DeadlineExceeded(1)])
    assert post("/v1/chat/completions", CHAT, worker=late).status_code == 504
    lines = post("/v1/chat/completions", CHAT | {"stream": True}, worker=late).text.strip().splitlines()
    assert '"deadline_exceeded"' in lines[-1] and "[DONE]" not in lines[-1]


async def test_within_does_not_change_other_timeouts() -> None:
    with pytest.raises(TimeoutError, match="another caller"):
        async with within(time.monotonic() + 100):
            raise TimeoutError("another caller's")


async def test_a_late_request_ends_at_its_first_wait() -> None:
    with pytest.raises(DeadlineExceeded):
        async with within(time.monotonic() - 1):
            await asyncio.Event().wait()


async def test_a_client_that_leaves_during_retrieval_causes_no_call_of_a_worker() -> None:
    served = serve_plainly(retriever=SilentRetriever())
    async with aclosing(served.ingress.stream(CHAT)) as chunks:
        client = asyncio.ensure_future(anext(chunks))
        while not served.retriever.calls:
            await asyncio.sleep(0)
        client.cancel()
        await asyncio.wait([client])
    assert client.cancelled() and not served.worker.calls
