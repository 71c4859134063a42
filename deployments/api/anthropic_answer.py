"""The answers of `/v1/messages`: a chat's answer, its chunks and its errors in the shape of Anthropic's API."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping
from contextlib import aclosing
from typing import Any, Literal, NotRequired, cast

from typing_extensions import TypedDict

from deployments.api.completion_responses import ChatAnswer, TextAnswer, split_calls
from deployments.api.completions import GenerationRequest
from deployments.api.responses import ErrorObject, PlanObject
from deployments.json_types import JsonMapping, JsonObject

_SURROGATES = re.compile("[\ud800-\udfff]")
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
_TYPES = {401: "authentication_error", 413: "request_too_large", 500: "api_error"}  # those that differ from ours
_REASONS: dict[str, StopReason] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class AnswerBlock(TypedDict):
    """A `text`, or a `tool_use` with `id`, `name` and `input`."""

    type: Literal["text", "tool_use"]
    text: NotRequired[str]
    id: NotRequired[str]
    name: NotRequired[str]
    input: NotRequired[JsonObject]


class MessageUsage(TypedDict):
    """`input_tokens`: those that no cache had."""

    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int


class MessageObject(TypedDict):
    """`lora`: the plan. `warning`: present if adapters ended the answer before its first text."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage
    lora: NotRequired[PlanObject]
    warning: NotRequired[str]


class CountedTokens(TypedDict):
    input_tokens: int


class AnthropicErrorAnswer(TypedDict):
    """The error response below `/v1/messages`."""

    type: Literal["error"]
    error: ErrorObject
    request_id: str


def anthropic_error(status: int, error: JsonMapping, request_id: str) -> JsonObject:
    """Return an error object of the OpenAI API in the shape of Anthropic's."""
    kind = "api_error" if error["type"] == "server_error" else _TYPES.get(status, error["type"])
    return {"type": "error", "error": {**error, "type": kind}, "request_id": request_id}


class MessageForm:
    """Gives one chat the shape of a message. It belongs to one request. One block is open at a time.

    `stops`: the stop strings that the client sent. One of a contract or a policy ends an answer as its own end does.
    """

    def __init__(self, model: str, request_id: str, stops: Collection[str] = ()) -> None:
        self._model, self._request_id, self._stops = model, request_id, stops
        self._blocks: list[AnswerBlock] = []
        self._block_arguments = ""
        self._is_open = False
        self._reason: StopReason | None = None
        self._stop: str | None = None
        self._usage = _convert_usage({"prompt_tokens": 0, "completion_tokens": 0})
        self._extras: JsonObject = {}
        self._has_begun = False

    def use(self, request: GenerationRequest, defaults: Mapping[str, float]) -> None:
        """Take the request as it was planned. A message repeats none of its fields."""

    def whole(self, answer: ChatAnswer | TextAnswer) -> MessageObject:
        """Return the message of a whole chat, which counts as a stream of one chunk."""
        [choice] = cast(ChatAnswer, answer)["choices"]
        for _ in self._make_events({**answer, "choices": [{**choice, "delta": choice["message"]}]}):
            pass
        return self._message()

    async def events(self, chunks: AsyncGenerator[JsonObject]) -> AsyncGenerator[JsonObject]:
        """Yield the typed events of the chunks of a chat. They must include the usage."""
        async with aclosing(chunks):
            async for chunk in chunks:
                for event in self._make_events(chunk):
                    yield event

    def failed(self, error: JsonObject) -> Iterator[JsonObject]:
        """Yield the event of a stream that ends with this error."""
        yield anthropic_error(0, error, self._request_id)

    def _make_events(self, chunk: JsonMapping) -> Iterator[JsonObject]:
        self._extras |= {name: value for name, value in chunk.items() if name in ("lora", "warning")}
        if not self._has_begun:
            self._has_begun = True
            yield {"type": "message_start", "message": self._message()}
        for choice in chunk["choices"]:
            open_calls, new_calls = split_calls(choice["delta"])
            for call in open_calls:
                yield from self._add_call(call)
            if text := choice["delta"].get("content"):
                yield from self._add_text(text)
            for call in new_calls:
                yield from self._add_call(call)
            if choice["finish_reason"]:
                self._reason = _REASONS[choice["finish_reason"]]
                if self._reason == "end_turn" and choice.get("stop_reason") in self._stops:
                    self._reason, self._stop = "stop_sequence", choice["stop_reason"]
                yield from self._close()
        if "usage" in chunk:
            self._usage = _convert_usage(chunk["usage"])
            end = {"stop_reason": self._reason, "stop_sequence": self._stop}
            yield {"type": "message_delta", "delta": end, "usage": self._usage}
            yield {"type": "message_stop"}

    def _add_text(self, text: str) -> Iterator[JsonObject]:
        if not self._is_open or self._blocks[-1]["type"] != "text":
            yield from self._open({"type": "text", "text": ""})
        self._blocks[-1]["text"] += text
        yield self._delta({"type": "text_delta", "text": text})

    def _add_call(self, call: JsonMapping) -> Iterator[JsonObject]:
        function = call["function"]
        if "id" in call:
            yield from self._open({"type": "tool_use", "id": call["id"], "name": function["name"], "input": {}})
        if function["arguments"]:
            self._block_arguments += function["arguments"]
            yield self._delta({"type": "input_json_delta", "partial_json": function["arguments"]})

    def _open(self, block: AnswerBlock) -> Iterator[JsonObject]:
        yield from self._close()
        self._blocks.append(block)
        self._is_open = True
        yield {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": {**block}}

    def _close(self) -> Iterator[JsonObject]:
        """Complete the open block, if there is one."""
        if not self._is_open:
            return
        self._is_open = False
        if self._blocks[-1]["type"] == "tool_use":
            self._blocks[-1]["input"] = _arguments(self._block_arguments)
            self._block_arguments = ""
        yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    def _delta(self, delta: JsonObject) -> JsonObject:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _message(self) -> MessageObject:
        message: MessageObject = {
            "id": f"msg_{self._request_id}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": list(self._blocks),
            "stop_reason": self._reason,
            "stop_sequence": self._stop,
            "usage": self._usage,
        }
        return {**message, **self._extras}  # type: ignore[typeddict-item]


def _arguments(text: str) -> JsonObject:
    """Return the arguments of a call, without characters that UTF-8 lacks.

    They are {} where an answer was cut off, where they are nested too deeply, or where a number is one that no double
    holds: no JSON answer can have such arguments.
    """
    try:
        found: Any = json.loads(text or "{}")
        written = json.dumps({"content": [{"input": found}]}, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        return {}
    if _SURROGATES.search(written):
        found = json.loads(_SURROGATES.sub("\ufffd", written))["content"][0]["input"]
    return found if isinstance(found, dict) else {}


def _convert_usage(usage: JsonMapping) -> MessageUsage:
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage["completion_tokens"],
    }
