from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import Request

from deployments.api.completions import ChatCompletionRequest, CompletionRequest, parse
from deployments.errors import RequestInvalid
from deployments.http.middleware import PROXY_HEADERS, is_loopback
from deployments.http.routes.completions import events
from deployments.http.routes.maintenance import json_lines
from deployments.observability.request_context import RequestContext
from gpu_worker.errors import EngineStopped

CONTEXT = RequestContext("r", "none")
USER = {"role": "user", "content": "Hi"}


def test_a_mapping_is_parsed_as_the_matching_request() -> None:
    assert parse({"messages": [USER]}) == ChatCompletionRequest.model_validate({"messages": [USER]})
    assert parse({"prompt": "Hi"}) == CompletionRequest(prompt="Hi")
    request = CompletionRequest(prompt="Hi")
    assert parse(request) is request


def test_a_bad_mapping_is_refused_by_its_field() -> None:
    with pytest.raises(RequestInvalid) as caught:
        parse({"messages": [USER], "lora": {"k": 0, "strategy": "best"}})
    assert caught.value.param in ("lora.k", "lora.strategy")
    assert "(and 1 more)" in str(caught.value)


def events_of(*chunks: dict[str, Any] | Exception) -> list[str]:
    async def source() -> AsyncIterator[dict[str, Any]]:
        for chunk in chunks:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    async def collect() -> list[str]:
        return [event.decode() async for event in events({"n": 0}, source(), CONTEXT)]

    return asyncio.run(collect())


def test_chunks_are_events_and_the_last_event_is_done() -> None:
    assert events_of({"n": 1}, {"text": "a\nb"}) == [
        'data: {"n": 0}\n\n',
        'data: {"n": 1}\n\n',
        'data: {"text": "a\\nb"}\n\n',
        "data: [DONE]\n\n",
    ]


def test_an_error_in_the_middle_is_the_last_event() -> None:
    found = events_of({"n": 1}, EngineStopped("it stopped"))
    assert found[:2] == ['data: {"n": 0}\n\n', 'data: {"n": 1}\n\n']
    [last] = found[2:]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["code"], error["message"]) == ("unavailable", "it stopped")


@pytest.mark.parametrize(("keep_alive_s", "num_comments"), [(3.0, 2), (6.0, 1), (7.0, 0)])
def test_a_silent_stream_is_kept_alive_by_comments(keep_alive_s: float, num_comments: int) -> None:
    now = 0.0

    async def source() -> AsyncIterator[dict[str, Any] | None]:
        nonlocal now
        for _ in range(6):
            now += 1.0
            yield None
        yield {"n": 1}
        now += 1.0
        yield None

    async def collect() -> list[bytes]:
        found = events({"n": 0}, source(), CONTEXT, keep_alive_s=keep_alive_s, clock=lambda: now)  # type: ignore[arg-type]
        return [event async for event in found]

    comment = b": ping\n\n"
    opening, *between, last, done = asyncio.run(collect())
    assert between == [comment] * num_comments
    assert [opening, last, done] == [b'data: {"n": 0}\n\n', b'data: {"n": 1}\n\n', b"data: [DONE]\n\n"]


def test_leaving_the_events_leaves_the_chunks_at_once() -> None:
    left = []

    async def source() -> AsyncIterator[dict[str, Any]]:
        try:
            while True:
                yield {"n": 1}
        finally:
            left.append(True)

    async def leave() -> None:
        chunks = source()
        stream = events({"n": 0}, chunks, CONTEXT)
        await anext(stream)
        await anext(stream)
        await stream.aclose()
        assert left == [True]

    asyncio.run(leave())


def lines_of(*lines: dict[str, Any] | Exception) -> list[str]:
    async def source() -> AsyncIterator[dict[str, Any]]:
        for line in lines:
            if isinstance(line, Exception):
                raise line
            yield line

    async def collect() -> list[str]:
        return [line async for line in json_lines({"done": 0}, source(), CONTEXT)]

    return asyncio.run(collect())


def test_progress_is_one_object_per_line_and_an_error_is_the_last() -> None:
    assert lines_of({"done": 1}, {"result": "a\nb"}) == ['{"done": 0}\n', '{"done": 1}\n', '{"result": "a\\nb"}\n']
    *_, last = lines_of({"done": 1}, EngineStopped("it stopped"))
    assert json.loads(last)["error"]["code"] == "unavailable"


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        (("127.0.0.1", 1), True),
        (("127.8.0.1", 1), True),
        (("::1", 1), True),
        (("10.0.0.1", 1), False),
        (("::ffff:10.0.0.1", 1), False),
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
        b"x-forwarded-host",
        b"x-forwarded-proto",
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
        ("http://localhost:3000", True),
        ("http://[::1]:8000", True),
        ("http://10.0.0.1", False),
        ("https://evil.example", False),
        ("https://localhost.evil.example", False),
        ("https://127.0.0.1.evil.example", False),
        ("null", False),
        ("http://[evil", False),
        ("http://[::1", False),
        ("", False),
    ],
)
def test_a_page_of_another_site_is_not_on_this_machine(origin: str, expected: bool) -> None:
    scope = {"type": "http", "client": ("127.0.0.1", 1), "headers": [(b"origin", origin.encode())]}
    assert is_loopback(Request(scope)) is expected
