from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import pytest
from fastapi import Request

from deployments.api.completions import MAX_ROWS, parse
from deployments.calls.worker_client import HEARTBEAT_INTERVAL_S
from deployments.errors import RequestInvalid
from deployments.http.dependencies import PROXY_HEADERS, is_loopback
from deployments.http.routes.completions import events
from deployments.observability.request_context import RequestContext
from gpu_worker.errors import EngineFull
from gpu_worker.front.request.request import Delta, Job
from tests.deployments.app_fakes import http_of, serve_plainly
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.fake_worker import DELTAS, FakeWorker
from tests.virtual_time import in_virtual_time, run_in_virtual_time

CONTEXT = RequestContext("r", "none")
USER = {"role": "user", "content": "Hi"}


def test_a_bad_mapping_is_refused_by_its_field() -> None:
    with pytest.raises(RequestInvalid) as caught:
        parse({"messages": [USER], "lora": {"k": 0, "strategy": "best"}})
    assert caught.value.param in ("lora.k", "lora.strategy")
    assert "(and 1 more)" in str(caught.value)


async def test_chunks_are_events_and_the_last_event_is_done() -> None:
    async def source() -> AsyncGenerator[dict[str, Any]]:
        yield {"n": 0}
        yield {"text": "a\nb"}

    assert [event async for event in events(source(), CONTEXT)] == [
        b'data: {"n": 0}\n\n',
        b'data: {"text": "a\\nb"}\n\n',
        b"data: [DONE]\n\n",
    ]


class Noting(dict[str, Any]):
    """An object that notes in which threads its items are read, as an encoder does."""

    def __init__(self, *items: Any) -> None:
        super().__init__(*items)
        self.threads: set[threading.Thread] = set()

    def items(self) -> Any:
        self.threads.add(threading.current_thread())
        return super().items()


TOKEN = {"token": "\u2028", "logprob": -1.0, "bytes": [226, 128, 168], "top_logprobs": []}


@pytest.mark.parametrize("name", [None, "response.output_text.done"])
@pytest.mark.parametrize(("num_tokens", "in_loop"), [(1, True), (MAX_ROWS, True), (MAX_ROWS + 1, False)])
async def test_an_event_with_many_log_probabilities_is_encoded_in_a_thread(
    name: str | None, num_tokens: int, *, in_loop: bool
) -> None:
    chunk = Noting({"choices": [{"logprobs": {"content": [TOKEN] * num_tokens}}]} | ({"type": name} if name else {}))

    async def source() -> AsyncGenerator[dict[str, Any]]:
        yield chunk

    [event, _] = [event.decode() async for event in events(source(), CONTEXT)]
    assert {thread is threading.current_thread() for thread in chunk.threads} == {in_loop}
    *names, data, end, _ = event.split("\n")
    assert names == ([f"event: {name}"] if name else []) and end == ""
    assert data.isascii(), "some clients end a line at U+2028"
    assert json.loads(data.removeprefix("data: ")) == chunk


@pytest.mark.parametrize(("keep_alive_s", "num_comments"), [(2.9, 2), (5.9, 1), (6.1, 0)])
def test_a_silent_stream_is_kept_alive_by_comments(keep_alive_s: float, num_comments: int) -> None:
    async def source() -> AsyncGenerator[dict[str, Any]]:
        yield {"n": 0}
        await asyncio.sleep(6.0)
        yield {"n": 1}

    async def collect() -> list[bytes]:
        return [event async for event in events(source(), CONTEXT, keep_alive_s=keep_alive_s)]

    comment = b": ping\n\n"
    opening, *between, last, done = run_in_virtual_time(collect())
    assert between == [comment] * num_comments
    assert [opening, last, done] == [b'data: {"n": 0}\n\n', b'data: {"n": 1}\n\n', b"data: [DONE]\n\n"]


async def heartbeats(delay_s: float) -> AsyncIterator[None]:
    """Yield what a worker sends every five seconds, the first one at once."""
    while delay_s > 0:
        yield None
        await asyncio.sleep(min(delay_s, HEARTBEAT_INTERVAL_S))
        delay_s -= HEARTBEAT_INTERVAL_S


class SlowWorker(FakeWorker):
    """Answers, or fails, after `delay_s`."""

    def __init__(self, delay_s: float, events: Sequence[Delta | Exception] = DELTAS) -> None:
        super().__init__(events)
        self.delay_s = delay_s

    async def stream(self, job: Job) -> AsyncIterator[Delta | None]:
        async for beat in heartbeats(self.delay_s):
            yield beat
        async for delta in super().stream(job):
            yield delta


class SlowSecond(FakeWorker):
    """Answers the first prompt at once, and another one after 35 seconds."""

    async def stream(self, job: Job) -> AsyncIterator[Delta | None]:
        async for beat in heartbeats(35.0 if job.prompt == "Ho" else 0.0):
            yield beat
        async for delta in super().stream(job):
            yield delta


BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [USER]},
    "/v1/completions": {"prompt": ["Hi", "Ho"]},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": [USER], "max_tokens": 9},
}


class SlowRetriever(FakeRetriever):
    """Finds a model after 35 seconds."""

    async def find_model(self, *asked: Any) -> Any:
        await asyncio.sleep(35)
        return await super().find_model(*asked)


def stream_of(path: str, worker: FakeWorker, retriever: FakeRetriever | None = None) -> Any:
    """Return the answer to a streamed request of a server that keeps streams alive every 10 seconds."""

    async def run() -> Any:
        served = serve_plainly(worker=worker, retriever=retriever, keep_alive_s=10.0)
        async with http_of(served) as client:
            return await client.post(path, json=BODIES[path] | {"model": "poet", "stream": True})

    return run_in_virtual_time(run())


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("delay_s", "num_comments"), [(9.0, 0), (11.0, 1), (35.0, 3)])
def test_a_stream_without_a_token_yet_begins_with_comments(path: str, delay_s: float, num_comments: int) -> None:
    late, prompt = (stream_of(path, SlowWorker(seconds)) for seconds in (delay_s, 0.0))
    assert late.status_code == 200 and late.headers["x-lora-strategy"] == prompt.headers["x-lora-strategy"]
    comments = ": ping\n\n" * num_comments
    assert late.text.startswith(comments) and not late.text.startswith(": ping\n\n" * (num_comments + 1))
    rest = late.text.removeprefix(comments)
    assert [line[:9] for line in rest.splitlines()] == [line[:9] for line in prompt.text.splitlines()]


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_that_is_planned_for_long_begins_with_comments(path: str) -> None:
    late, prompt = (stream_of(path, FakeWorker(), retriever) for retriever in (SlowRetriever(), None))
    pings, rest = [": ping"] * 3, late.text.split("\n\n")
    assert late.status_code == 200 and rest[:3] == pings and len(rest[3:]) == len(prompt.text.split("\n\n"))


def test_a_stream_sends_comments_while_another_of_its_prompts_waits_for_a_worker() -> None:
    late, prompt = (stream_of("/v1/completions", worker) for worker in (SlowSecond(), FakeWorker()))
    events = late.text.split("\n\n")
    pings = [place for place, event in enumerate(events) if event == ": ping"]
    assert len(pings) == 3 and pings[0] > 0 and pings[-1] < len(events) - 3, "between the two answers"
    assert len(events) - len(pings) == len(prompt.text.split("\n\n"))


@pytest.mark.parametrize("path", BODIES)
def test_an_error_before_the_first_token_has_its_status_until_a_comment_is_sent(path: str) -> None:
    early, late = (stream_of(path, SlowWorker(seconds, [EngineFull("full")])) for seconds in (9.0, 11.0))
    assert early.status_code == 503 and early.json()["error"]["code"] == "overloaded"
    assert early.headers["retry-after"] == "1"
    assert late.status_code == 200 and late.text.startswith(": ping\n\n")
    names = [line.removeprefix("event: ") for line in late.text.splitlines() if line.startswith("event: ")]
    assert names == {
        "/v1/responses": ["response.created", "response.in_progress", "response.failed", "error"],
        "/v1/messages": ["error"],
    }.get(path, [])
    last = json.loads(late.text.strip().splitlines()[-1].removeprefix("data: "))
    assert last["error"]["code"] == "overloaded"


def waiting(left: list[bool], *chunks: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
    """Return a stream that is silent for long after these chunks. Leaving it takes a while."""

    async def source() -> AsyncGenerator[dict[str, Any]]:
        try:
            for chunk in chunks:
                yield chunk
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(1)
            left.append(True)

    return source()


@pytest.mark.parametrize("chunks", [(), ({"n": 1},)], ids=["before the first chunk", "later"])
@in_virtual_time
async def test_leaving_while_a_chunk_is_awaited_leaves_the_chunks(chunks: tuple[dict[str, Any], ...]) -> None:
    left: list[bool] = []
    stream = events(waiting(left, *chunks), CONTEXT)
    assert [await anext(stream) for _ in (*chunks, "a comment")][-1] == b": ping\n\n"
    await stream.aclose()
    assert left == [True]


@in_virtual_time
async def test_a_stream_that_is_cancelled_again_and_again_still_leaves_the_chunks() -> None:
    """A disconnect cancels the response at each turn of the event loop until it has ended."""
    left: list[bool] = []

    async def read() -> None:
        async for _ in events(waiting(left, {"n": 1}), CONTEXT):
            pass

    reading = asyncio.create_task(read())
    await asyncio.sleep(5)
    while not reading.done():
        reading.cancel()
        await asyncio.sleep(0.3)
    assert reading.cancelled() and left == [True]


async def test_leaving_the_events_leaves_the_chunks_at_once() -> None:
    left = []

    async def source() -> AsyncGenerator[dict[str, Any]]:
        try:
            while True:
                yield {"n": 1}
        finally:
            left.append(True)

    stream = events(source(), CONTEXT)
    await anext(stream)
    await anext(stream)
    await stream.aclose()
    assert left == [True]


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        (("127.0.0.1", 1), True),
        (("127.8.0.1", 1), True),
        (("::1", 1), True),
        (("::ffff:127.0.0.1", 1), True),
        (("::ffff:7f00:1", 1), True),
        (("10.0.0.1", 1), False),
        (("::ffff:10.0.0.1", 1), False),
        (("::127.0.0.1", 1), False),
        (("64:ff9b::127.0.0.1", 1), False),
        (("2002:7f00:1::", 1), False),
        (("somewhere", 1), False),
        (("", 0), False),
        (None, False),
    ],
)
def test_only_this_machine_is_loopback(client: tuple[str, int] | None, expected: bool) -> None:
    assert is_loopback(Request({"type": "http", "client": client, "headers": []})) is expected


@pytest.mark.parametrize(
    "header",
    [
        *(name.encode() for name in sorted(PROXY_HEADERS)),
        b"x-forwarded-for",
        b"x-forwarded-anything",
    ],
)
def test_a_client_behind_a_reverse_proxy_is_not_on_this_machine(header: bytes) -> None:
    scope = {"type": "http", "client": ("127.0.0.1", 1), "headers": [(header, b"192.0.2.7")]}
    assert is_loopback(Request(scope)) is False


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://[::ffff:7f00:1]:8000", True),
        ("http://10.0.0.1", False),
        ("", False),
    ],
)
def test_a_page_of_another_site_is_not_on_this_machine(origin: str, expected: bool) -> None:
    scope = {"type": "http", "client": ("127.0.0.1", 1), "headers": [(b"origin", origin.encode())]}
    assert is_loopback(Request(scope)) is expected
