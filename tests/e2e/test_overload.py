"""Overload, clients that leave and deadlines, over HTTP against a running application."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass
from typing import Self

import httpx
import pytest

from tests.e2e.live import APP, BASE, CONTEXT, Live, abandon, completion, eventually_equal, running_and_waiting
from tests.soak import Scale

_LONG = completion(BASE, "The sea is", CONTEXT - 100)


@pytest.mark.parametrize("stream", [False, True])
def test_disconnected_clients_free_everything_at_once(live: Live, stream: bool) -> None:
    """Some of them wait for the whole answer."""
    before = [held.free_kv_rows for held in live.on_all("Worker", "load")]
    count = 30
    if stream:
        asyncio.run(abandon_streams(live, count))
    else:
        asyncio.run(abandon(live.url, APP, _LONG, count))
    eventually_equal(lambda: running_and_waiting(APP), 0)
    assert [held.free_kv_rows for held in live.on_all("Worker", "load")] == before


async def abandon_streams(live: Live, count: int) -> None:
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:

        async def open_and_leave() -> None:
            async with client.stream("POST", f"{live.url}/v1/completions", json={**_LONG, "stream": True}) as response:
                assert response.status_code == 200
                await anext(response.aiter_lines())

        asking = [asyncio.create_task(open_and_leave()) for _ in range(count)]
        await asyncio.wait(asking, timeout=2.0)
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)


def test_a_request_ends_at_its_deadline(live: Live) -> None:
    answer = live.call("POST", "/v1/completions", json={**_LONG, "timeout_s": 0.3})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    eventually_equal(lambda: running_and_waiting(APP), 0)


@dataclass(frozen=True)
class Asked:
    status: int
    seconds: float
    text: str
    retry_after: str | None

    @classmethod
    def parse(cls, answer: bytes, seconds: float) -> Self:
        head, _, content = answer.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = json.loads(content)
        text = body["error"]["code"] if "error" in body else body["choices"][0]["text"]
        return cls(int(status.split()[1]), seconds, text, headers.get("retry-after"))


async def ask_at_once(address: str, model: str, count: int, max_tokens: int) -> list[Asked]:
    """Return the responses to this many clients. They write HTTP by hand, to leave the two cores to the server."""
    url = httpx.URL(f"{address}/v1/completions")
    body = json.dumps(completion(model, "The sea is", max_tokens))
    head = f"POST {url.path} HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()

    async def ask() -> Asked:
        began = time.monotonic()
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(), 120)
        took_s = time.monotonic() - began
        writer.close()
        return Asked.parse(answer, took_s)

    return list(await asyncio.gather(*[ask() for _ in range(count)]))


def test_a_burst_is_answered_or_refused_at_once_and_leaves_no_state(live: Live, scale: Scale) -> None:
    num_tokens = 200  # so that the workers cannot keep up with the clients
    quiet = live.text(BASE, max_tokens=num_tokens)
    asked = asyncio.run(ask_at_once(live.url, BASE, scale.pick("clients at once", small=100, full=200), num_tokens))
    assert {each.status for each in asked} == {200, 429}, Counter((each.status, each.text[:40]) for each in asked)
    served = [each for each in asked if each.status == 200]
    refused = [each for each in asked if each.status == 429]
    assert len(served) >= 32  # as many as the replica accepts
    assert {each.text for each in served} == {quiet}
    assert {each.retry_after for each in refused} == {"1"}
    longest, slowest = (max(each.seconds for each in some) for some in (served, refused))
    assert slowest < longest, "a refusal waited for a place"
    assert live.call("GET", "/ready").status_code == 200
    assert live.text(BASE, max_tokens=num_tokens) == quiet
    assert running_and_waiting(APP) == 0


def test_an_accepted_burst_is_answered_or_refused_for_waiting_too_long(url: str, scale: Scale) -> None:
    """These are fewer than `max_concurrent_requests`: each gets a row within `max_wait_s`, or a 503."""
    model = "gemma-3-270m"
    [quiet] = asyncio.run(ask_at_once(url, model, 1, 4))
    count = scale.pick("clients let in at once", small=50, full=200)
    asked = asyncio.run(ask_at_once(url, model, count, 4))
    outcomes = {(each.status, each.text, each.retry_after) for each in asked}
    assert (200, quiet.text, None) in outcomes
    assert outcomes <= {(200, quiet.text, None), (503, "overloaded", "1")}
    assert httpx.get(f"{url}/ready", timeout=120).status_code == 200
    [after] = asyncio.run(ask_at_once(url, model, 1, 4))
    assert after.text == quiet.text


def test_a_conversation_stays_on_the_worker_that_has_its_turns(live: Live) -> None:
    """Two workers: without it half of the turns would find nothing. A worker that answers too late loses a turn."""
    chats: list[list[dict[str, str]]] = [
        [{"role": "user", "content": f"The sea at port {number} is " + "wide and deep " * 8}] for number in range(6)
    ]
    before, found = [0] * len(chats), []
    for turn in range(4):
        for number, messages in enumerate(chats):
            asked = {"model": BASE, "messages": messages, "max_tokens": 8, "temperature": 0}
            answer = live.call("POST", "/v1/chat/completions", json=asked).json()
            usage = answer["usage"]
            if turn:
                found.append(usage["prompt_tokens_details"]["cached_tokens"] >= 0.9 * before[number])
            before[number] = usage["prompt_tokens"]
            messages += [answer["choices"][0]["message"], {"role": "user", "content": f"And at hour {turn}?"}]
    assert sum(found) >= 0.85 * len(found), found


def test_a_header_without_end_is_refused_by_the_proxy(live: Live) -> None:
    """It never reaches the application. Without a limit it would block the proxy and all other requests."""

    async def send() -> bytes:
        url = httpx.URL(live.url)
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 20_000)
        return await asyncio.wait_for(reader.read(), 120)

    assert asyncio.run(send()).startswith(b"HTTP/1.1 400")
    assert live.call("GET", "/health").status_code == 200
