"""Messages and their events, built from the chunks of a chat."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from deployments.api.anthropic_answer import MessageForm
from deployments.api.completion_responses import Answer
from deployments.api.responses import Planned
from deployments.json_types import JsonObject
from gpu_worker.front.request.request import Completion, Delta
from gpu_worker.front.request.tools import ToolCallPiece
from lora_store import BASE_PLAN
from tests.deployments.random_calls import random_calls

ANSWER = Answer("chat", "auto", [Planned(BASE_PLAN)], request_id="r")


def streamed(deltas: list[Delta]) -> tuple[str, list[Any], str]:
    """Return the text, the calls and the reason of a stream. Each delta must fit the block that is open."""

    async def chunks() -> AsyncGenerator[JsonObject]:
        for chunk in [ANSWER.opening(), *[ANSWER.chunk(0, delta) for delta in deltas], ANSWER.usage_chunk(deltas[-1:])]:
            yield chunk

    async def collect() -> list[JsonObject]:
        return [event async for event in MessageForm("auto", "r").events(chunks())]

    blocks: list[JsonObject] = []
    reason = ""
    for event in asyncio.run(collect()):
        if event["type"] == "content_block_start":
            blocks.append(event["content_block"] | {"arguments": ""})
        elif event["type"] == "content_block_delta":
            delta, block = event["delta"], blocks[event["index"]]
            if delta["type"] == "text_delta":
                block["text"] += delta["text"]
            else:
                assert block["type"] == "tool_use"
                block["arguments"] += delta["partial_json"]
        elif event["type"] == "message_delta":
            reason = event["delta"]["stop_reason"]
    calls = [(block["name"], json.loads(block["arguments"])) for block in blocks if block["type"] == "tool_use"]
    return "".join(block["text"] for block in blocks if block["type"] == "text"), calls, reason


DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"a": 1e999}', {}),
        (DEEP, {}),
        ('{"a": ' + "9" * 5000 + "}", {}),
        ('{"a": "\\ud83d\\ud83d\\ude00 \u00e4"}', {"a": "\ufffd\U0001f600 \u00e4"}),
        ('{"a": "\\u0000", "b": 1e308}', {"a": "\x00", "b": 1e308}),
    ],
    ids=["infinity", "deep", "digits", "half a pair", "usual"],
)
def test_a_call_has_arguments_that_an_answer_can_hold(arguments: str, shown: JsonObject) -> None:
    call = Delta("", 5, 2, "tool_calls", tool_calls=(ToolCallPiece(0, arguments, "c", "f"),))
    [block] = MessageForm("auto", "r").whole(ANSWER.whole([Completion.joined([call])]))["content"]
    assert block["input"] == shown


def test_a_stream_has_the_blocks_of_the_whole_message_however_it_is_merged() -> None:
    for seed in range(100):
        deltas = random_calls(seed)
        message = MessageForm("auto", "r").whole(ANSWER.whole([Completion.joined(deltas)]))
        text = "".join(block.get("text", "") for block in message["content"])
        calls = [(block["name"], block["input"]) for block in message["content"] if block["type"] == "tool_use"]
        assert calls and streamed(deltas) == (text, calls, message["stop_reason"]), seed
