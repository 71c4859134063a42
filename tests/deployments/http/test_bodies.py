from __future__ import annotations

import asyncio
import json
import time
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.byte_budget import ByteBudget
from deployments.errors import RequestInvalid
from deployments.http.bodies import MAX_JSON_VALUES, BodyLimit, read_json
from tests.deployments.all_routes import example_path, mounted
from tests.deployments.app_fakes import http_of, serve_plainly, with_context
from tests.deployments.asking import error_of, request
from tests.deployments.held_worker import CHAT, Held
from tests.deployments.key_files import bearer, entry, write
from tests.virtual_time import run_in_virtual_time

SCOPE = {"type": "http", "method": "POST", "path": "/", "headers": []}


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the whole body."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def limited(app: ASGIApp, budget: ByteBudget | None = None) -> ASGIApp:
    return with_context(BodyLimit(app, lambda scope: 8, budget or ByteBudget(1000), 30.0))


async def post(content: bytes | AsyncIterator[bytes]) -> httpx.Response:
    transport = httpx.ASGITransport(limited(echo))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post("/", content=content)


async def sent_by(app: ASGIApp, receive: Receive) -> list[Message]:
    """Return what the limited application sends."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await limited(app)(SCOPE | {}, receive, send)
    return sent


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


@pytest.mark.parametrize("content", [b"", b"12345678", chunks(b"1234", b"5678")])
async def test_a_body_up_to_the_limit_arrives_whole(content: bytes | AsyncIterator[bytes]) -> None:
    response = await post(content)
    assert response.status_code == 200
    assert response.content == (b"" if content == b"" else b"12345678")


@pytest.mark.parametrize("content", [b"123456789", chunks(b"1234", b"5678", b"9")])
async def test_a_larger_body_is_refused_also_without_an_announced_length(content: bytes | AsyncIterator[bytes]) -> None:
    response = await post(content)
    assert response.status_code == 413
    assert json.loads(response.content)["error"]["code"] == "body_too_large"


async def test_reading_stops_at_the_limit() -> None:
    read = []

    async def long() -> Message:
        read.append(4)
        assert len(read) < 100, "nothing stops the reading"
        return {"type": "http.request", "body": b"1234", "more_body": True}

    assert (await sent_by(echo, long))[0]["status"] == 413
    assert sum(read) == 12


async def test_a_request_whose_client_is_gone_is_not_answered() -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.disconnect"

    async def gone() -> Message:
        return {"type": "http.disconnect"}

    assert await sent_by(silent, gone) == []


def test_other_scopes_pass() -> None:
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def nothing(*_: object) -> Message:
        return {}

    asyncio.run(limited(app)({"type": "lifespan"}, nothing, nothing))
    assert seen == ["lifespan"]


def test_a_slow_body_is_refused_and_a_slow_reader_is_not() -> None:
    async def trickle() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    start, body = run_in_virtual_time(sent_by(echo, trickle))
    assert start["status"] == 408
    assert json.loads(body["body"])["error"]["code"] == "request_too_slow"

    async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["body"] == b"1234"
        assert (await receive())["type"] == "http.disconnect"

    messages: list[Message] = [{"type": "http.request", "body": b"1234"}, {"type": "http.disconnect"}]

    async def read_then_wait() -> Message:
        if len(messages) == 1:
            await asyncio.sleep(1000)  # longer than the time limit of a body
        return messages.pop(0)

    assert run_in_virtual_time(sent_by(waiting, read_then_wait)) == []


async def test_stalled_bodies_stay_within_the_budget_and_release_it() -> None:
    budget = ByteBudget(10)
    goes_on = asyncio.Event()

    async def stalls() -> AsyncIterator[bytes]:
        yield b"123456"
        await goes_on.wait()
        yield b"78"

    transport = httpx.ASGITransport(limited(echo, budget))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        first = asyncio.create_task(client.post("/", content=stalls()))
        while budget.num_bytes < 6:
            await asyncio.sleep(0)
        busy = await client.post("/", content=b"12345")
        assert busy.json()["error"]["code"] == "overloaded"
        small = await client.post("/", content=b"1234")
        goes_on.set()
        assert [busy.status_code, small.status_code, (await first).status_code] == [503, 200, 200]
    assert budget.num_bytes == 0


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "OPTIONS"])
async def test_an_unexpected_body_is_refused_unread_on_every_route(method: str) -> None:
    """An endless body is not read, and its client gets an answer."""
    read: list[bool] = []

    async def endless() -> AsyncIterator[bytes]:
        while True:
            read.append(True)
            assert len(read) < 100, "nothing stops the reading"
            yield b"x"

    num_asked = 0
    async with http_of(serve_plainly()) as client:
        for known, path in mounted():
            if known != method:
                continue
            response = await client.request(method, example_path(path), content=endless())
            assert response.status_code == 400, path
            if method != "HEAD":
                assert error_of(response)["code"] == "invalid_request"
            num_asked += 1
        unknown = await client.request(method, "/ready", content=b"x")
        assert unknown.status_code == 400
    assert num_asked == len([key for key in mounted() if key[0] == method])
    assert read == []


@pytest.mark.parametrize("headers", [{}, {"content-length": "0"}])
def test_a_request_without_a_body_may_announce_that(headers: dict[str, str]) -> None:
    assert request("GET", "/health", sent={"headers": headers}).status_code == 200


MIB = 1 << 20


async def padded(num_bytes: int) -> AsyncIterator[bytes]:
    """Return a request whose JSON is mostly blanks, in two parts, so that the server copies it when joining them."""
    yield json.dumps(CHAT | {"stream": True}).encode()
    yield b" " * num_bytes


async def post_json(client: httpx.AsyncClient, content: AsyncIterator[bytes], key: str = "") -> httpx.Response:
    headers = {"content-type": "application/json"} | (bearer(key) if key else {})
    return await client.post("/v1/chat/completions", content=content, headers=headers)


async def test_a_parsed_body_uses_neither_budget_nor_memory() -> None:
    worker = Held()
    served = serve_plainly(worker=worker, max_body_total_bytes=4 * MIB)
    async with http_of(served) as client:
        await served.services.preload.wait()
        tracemalloc.start()
        try:
            running = []
            for count in range(1, 7):
                running.append(asyncio.create_task(post_json(client, padded(3 * MIB))))
                await worker.has(count)
            assert served.services.bodies.num_bytes < 10_000
            assert tracemalloc.get_traced_memory()[0] < 6 * MIB
        finally:
            tracemalloc.stop()
        worker.let_go.set()
        assert [response.status_code for response in await asyncio.gather(*running)] == [200] * 6
    assert served.services.bodies.num_bytes == 0


async def test_the_texts_of_a_body_count_until_its_answer_ends() -> None:
    worker = Held()
    served = serve_plainly(worker=worker)
    async with http_of(served) as client:
        running = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x" * 9000}))
        await worker.has(1)
        assert 9000 <= served.services.bodies.num_bytes < 10_000
        worker.let_go.set()
        assert (await running).status_code == 200
    assert served.services.bodies.num_bytes == 0


async def test_bodies_of_one_tenant_leave_room_for_another(tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.json", entry("a", tenant="a"), entry("b", tenant="b"))
    served = serve_plainly(keys_file=keys, max_body_total_bytes=16 * MIB)
    bodies = served.services.bodies
    goes_on = asyncio.Event()

    async def stalls() -> AsyncIterator[bytes]:
        yield b" " * (4 * MIB - 1000)
        await goes_on.wait()
        yield json.dumps(CHAT).encode()

    async with http_of(served) as client:
        running = [asyncio.create_task(post_json(client, stalls(), "a")) for _ in range(2)]
        while bodies.num_bytes < 7 * MIB:
            await asyncio.sleep(0)
        assert error_of(await post_json(client, padded(4 * MIB - 1000), "a"))["code"] == "overloaded"
        assert (await post_json(client, padded(4 * MIB - 1000), "b")).status_code == 200
        goes_on.set()
        assert [response.status_code for response in await asyncio.gather(*running)] == [200, 200]
    assert bodies.num_bytes == 0


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True], "b": {}},
        "x" * (1 << 20),
        "a,[{" * MAX_JSON_VALUES,
        '",\\"[' * MAX_JSON_VALUES,
        ["[" * MAX_JSON_VALUES, {"{,": ["\\", '"', "\\" * 9]}],
        [0] * (MAX_JSON_VALUES - 2),
    ],
    ids=["small", "a text", "marks", "escapes", "marks in keys", "as many as allowed"],
)
def test_a_body_within_the_bound_is_parsed_like_json(value: Any) -> None:
    assert read_json(json.dumps(value).encode()) == value
    assert read_json(json.dumps(value).encode("utf-16")) == value


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([0] * MAX_JSON_VALUES),
        json.dumps([[] for _ in range(MAX_JSON_VALUES // 2)]),
        json.dumps({str(number): 0 for number in range(MAX_JSON_VALUES)}),
        '["\\"", ' + "{}," * MAX_JSON_VALUES + "1]",
    ],
    ids=["numbers", "lists", "keys", "after an escape"],
)
def test_more_values_are_refused_before_parsing(text: str) -> None:
    with pytest.raises(RequestInvalid, match=f"more than {MAX_JSON_VALUES} JSON values"):
        read_json(text.encode())


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not valid JSON: Expecting value at line 1 column 1"),
        (b'{"a": 1,\n "b"}', "at line 2 column 5"),
        (b'"\xff"', "not utf-8 text: byte 1"),
        (b"9" * 5000, "number that cannot be read"),
        (b"[" * 5000, "nested too deeply"),
        (b'"abc\\', "not valid JSON"),
    ],
)
def test_invalid_json_is_refused_with_the_position(body: bytes, says: str) -> None:
    with pytest.raises(RequestInvalid, match=says):
        read_json(body)


@pytest.mark.parametrize(
    "piece", ['"",', '[,"",', ",\\\\", '"\\\\",'], ids=["strings", "marks", "backslashes", "escapes"]
)
def test_large_bodies_are_counted_quickly(piece: str) -> None:
    """The body is eight times the server's limit, and the bound is generous for slow machines."""
    body = (piece * (8 * (4 << 20) // len(piece))).encode()
    before = time.process_time()
    with pytest.raises(RequestInvalid, match=f"more than {MAX_JSON_VALUES} JSON values"):
        read_json(body)
    assert time.process_time() - before < 0.75
