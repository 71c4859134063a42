"""The answers of `/v1/responses`: a chat's answer as a response object, and a chat's chunks as typed events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Literal, NotRequired, cast

from typing_extensions import TypedDict

from deployments.api.completion_responses import ChatAnswer, ChatToken, TextAnswer
from deployments.api.responses import PlanObject
from deployments.api.responses_request import ResponsesRequest
from deployments.json_types import JsonMapping, JsonObject

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[JsonObject]
    logprobs: list[ChatToken]


class OutputMessage(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Status
    content: list[OutputText]


class InputDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(TypedDict):
    reasoning_tokens: int


class ResponsesUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Incomplete(TypedDict):
    reason: Literal["max_output_tokens"]


class ResponseError(TypedDict):
    code: str
    message: str


class ResponseObject(TypedDict):
    """`lora`: the plan. `warning`: present if adapters ended the answer before its first text. Nothing is stored."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    error: ResponseError | None
    incomplete_details: Incomplete | None
    model: str
    output: list[OutputMessage]
    usage: ResponsesUsage | None
    background: Literal[False]
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: JsonObject
    store: Literal[False]
    temperature: float
    text: JsonObject
    tool_choice: Literal["auto", "none"]
    tools: list[JsonObject]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    user: str | None
    lora: NotRequired[PlanObject]
    warning: NotRequired[str]


class ResponseForm:
    """Gives one chat the shape of a response. It belongs to one request, whose fields the response repeats."""

    def __init__(self, request: ResponsesRequest, request_id: str) -> None:
        self._request = request
        self._id, self._item_id = f"resp_{request_id}", f"msg_{request_id}"
        self._created_at = int(time.time())
        self._num_events = 0
        self._text: list[str] = []
        self._logprobs: list[ChatToken] = []
        self._is_open = False
        self._reason = ""
        self._usage: ResponsesUsage | None = None
        self._extras: JsonObject = {}

    def whole(self, answer: ChatAnswer | TextAnswer) -> ResponseObject:
        """Return the response to a whole chat."""
        [choice] = cast(ChatAnswer, answer)["choices"]
        self._text = [choice["message"]["content"] or ""]
        self._logprobs = list(choice["logprobs"]["content"]) if choice["logprobs"] else []
        self._reason, self._usage = choice["finish_reason"], _usage_of(answer["usage"])
        self._keep_extras(answer)
        return self._response(self._end)

    async def events(self, chunks: AsyncGenerator[JsonObject | None]) -> AsyncGenerator[JsonObject | None]:
        """Yield the typed events of the chunks of a chat. They must include the usage. None stays a heartbeat."""
        async with aclosing(chunks):
            async for chunk in chunks:
                if chunk is None:
                    yield None
                    continue
                for event in self._events_of(chunk):
                    yield event

    def failed(self, error: JsonObject) -> Iterator[JsonObject]:
        """Yield the events of a stream that ends with this error: the failed response, and the error for clients.

        OpenAI's clients raise for an event that has `error`; others read its other fields.
        """
        response = self._response("failed")
        response["error"] = {"code": "server_error", "message": error["message"]}
        yield self._event("response.failed", response=response)
        yield self._event("error", code=error["code"], message=error["message"], param=error["param"], error=error)

    def _events_of(self, chunk: JsonMapping) -> Iterator[JsonObject]:
        self._keep_extras(chunk)
        if not self._num_events:
            yield self._event("response.created", response=self._response("in_progress"))
            yield self._event("response.in_progress", response=self._response("in_progress"))
        for choice in chunk["choices"]:
            yield from self._events_of_choice(choice)
        if "usage" in chunk:
            self._usage = _usage_of(chunk["usage"])
            yield self._event(f"response.{self._end}", response=self._response(self._end))

    def _events_of_choice(self, choice: JsonMapping) -> Iterator[JsonObject]:
        text, reason = choice["delta"].get("content") or "", choice["finish_reason"]
        if (text or reason) and not self._is_open:
            yield from self._open()
        if text:
            logprobs = choice["logprobs"]["content"] if choice["logprobs"] else []
            self._text.append(text)
            self._logprobs += logprobs
            yield self._of_part("response.output_text.delta", delta=text, logprobs=logprobs)
        if reason:
            self._reason = reason
            yield from self._close()

    def _open(self) -> Iterator[JsonObject]:
        self._is_open = True
        item = self._message("in_progress") | {"content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._of_part("response.content_part.added", part=self._part())

    def _close(self) -> Iterator[JsonObject]:
        part = self._part()
        yield self._of_part("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
        yield self._of_part("response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=0, item=self._message(self._end))

    def _of_part(self, kind: str, **fields: object) -> JsonObject:
        return self._event(kind, item_id=self._item_id, output_index=0, content_index=0, **fields)

    def _event(self, kind: str, **fields: object) -> JsonObject:
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return event

    def _keep_extras(self, answer: JsonMapping | ChatAnswer | TextAnswer) -> None:
        self._extras |= {name: value for name, value in answer.items() if name in ("lora", "warning")}

    @property
    def _end(self) -> Literal["completed", "incomplete"]:
        return "incomplete" if self._reason == "length" else "completed"

    def _part(self) -> OutputText:
        text = "".join(self._text)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self._logprobs)}

    def _message(self, status: Status) -> OutputMessage:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [self._part()],
        }

    def _response(self, status: Status) -> ResponseObject:
        request = self._request
        items = [self._message("incomplete" if status == "failed" else status)]
        has_output = self._is_open if status == "failed" else status != "in_progress"
        response: ResponseObject = {
            "id": self._id,
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": request.model,
            "output": items if has_output else [],
            "usage": self._usage,
            "background": False,
            "instructions": request.instructions,
            "max_output_tokens": request.token_limit,
            "max_tool_calls": None,
            "metadata": request.metadata or {},
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": request.temperature,
            "text": request.text_format,
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": request.top_p,
            "truncation": "disabled",
            "user": request.user,
        }
        return {**response, **self._extras}  # type: ignore[typeddict-item]


def _usage_of(usage: JsonMapping) -> ResponsesUsage:
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
