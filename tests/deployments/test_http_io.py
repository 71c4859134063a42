from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request

from deployments.errors import RequestInvalid
from deployments.http_io import adapter_folders, events, is_loopback, parse
from deployments.schemas import ChatCompletionRequest, CompletionRequest
from gpu_worker.errors import EngineStopped

USER = {"role": "user", "content": "Hi"}


def test_a_mapping_is_read_as_the_route_it_looks_like() -> None:
    assert parse({"messages": [USER]}) == ChatCompletionRequest.model_validate({"messages": [USER]})
    assert parse({"prompt": "Hi"}) == CompletionRequest(prompt="Hi")
    request = CompletionRequest(prompt="Hi")
    assert parse(request) is request


def test_a_bad_mapping_is_refused_by_its_field() -> None:
    with pytest.raises(RequestInvalid) as caught:
        parse({"messages": [USER], "lora": {"k": 0, "z": 1}})
    assert caught.value.param == "lora.k"
    assert "(and 1 more)" in str(caught.value)


def events_of(*chunks: dict[str, Any] | Exception) -> list[str]:
    async def source() -> AsyncIterator[dict[str, Any]]:
        for chunk in chunks:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    async def collect() -> list[str]:
        return [event async for event in events({"n": 0}, source())]

    return asyncio.run(collect())


def test_chunks_are_events_and_the_last_one_says_done() -> None:
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
    assert (error["code"], error["message"]) == ("engine_stopped", "it stopped")


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
        stream = events({"n": 0}, chunks)
        await anext(stream)
        await anext(stream)
        await stream.aclose()
        assert left == [True]

    asyncio.run(leave())


def test_an_adapter_is_its_own_folder_and_a_folder_of_them_is_sorted(tmp_path: Path) -> None:
    for name in ("c", "a", "d", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    assert adapter_folders(tmp_path) == [tmp_path / name for name in "abcd"]
    assert adapter_folders(tmp_path / "a") == [tmp_path / "a"]
    assert adapter_folders(tmp_path / "empty") == []


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


@pytest.mark.parametrize("header", [b"forwarded", b"x-forwarded-for"])
def test_who_comes_through_a_reverse_proxy_is_not_on_this_machine(header: bytes) -> None:
    scope = {"type": "http", "client": ("127.0.0.1", 1), "headers": [(header, b"192.0.2.7")]}
    assert is_loopback(Request(scope)) is False
