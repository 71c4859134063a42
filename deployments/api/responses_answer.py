"""The answers of `/v1/responses`: a chat's answer as a response object, and a chat's chunks as typed events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from copy import deepcopy
from typing import Literal, NotRequired, cast

from typing_extensions import TypedDict

from deployments.api.completion_responses import ChatAnswer, TextAnswer, split_calls
from deployments.api.completions import MAX_ANSWER_LOGPROBS, GenerationRequest
from deployments.api.logprobs import ChatToken
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


class OutputCall(TypedDict):
    """`arguments`: a JSON object as text. `call_id`: what the item with the result names."""

    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: Status


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
    output: list[OutputMessage | OutputCall]
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
    tool_choice: str | JsonObject
    tools: list[JsonObject]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    user: str | None
    lora: NotRequired[PlanObject]
    warning: NotRequired[str]


class ResponseForm:
    """Gives one chat the shape of a response. It belongs to one request, whose fields the response repeats.

    The answer is a list of items: a message, then calls. One item is open at a time; the last ones are complete.
    Log probabilities are in the event of their text, and again in the events that repeat whole texts, unless there are
    more of them than a whole answer may have.
    """

    def __init__(self, request: ResponsesRequest, request_id: str) -> None:
        self._request, self._request_id = request, request_id
        self._defaults: Mapping[str, float] = {}
        self._created_at = int(time.time())
        self._num_events = 0
        self._num_logprobs = 0
        self._items: list[OutputMessage | OutputCall] = []
        self._is_open = False
        self._reason = ""
        self._usage: ResponsesUsage | None = None
        self._extras: JsonObject = {}

    def use(self, request: GenerationRequest, defaults: Mapping[str, float]) -> None:
        """Repeat the fields of this request, which the policy of a model name filled.

        `defaults`: what the server uses for sampling parameters that the request leaves unset.
        """
        assert isinstance(request, ResponsesRequest)
        self._request, self._defaults = request, defaults

    def whole(self, answer: ChatAnswer | TextAnswer) -> ResponseObject:
        """Return the response to a whole chat, which counts as a stream of one chunk."""
        [choice] = cast(ChatAnswer, answer)["choices"]
        chunk = {**answer, "choices": [{**choice, "delta": choice["message"]}]}
        [*_, last] = self._events_of(chunk)
        response: ResponseObject = last["response"]
        return response

    async def events(self, chunks: AsyncGenerator[JsonObject]) -> AsyncGenerator[JsonObject]:
        """Yield the typed events of the chunks of a chat. They must include the usage."""
        async with aclosing(chunks):
            async for chunk in chunks:
                for event in self._events_of(chunk):
                    yield event

    def failed(self, error: JsonObject) -> Iterator[JsonObject]:
        """Yield the events of a stream that ends with this error: the failed response, and the error for clients.

        OpenAI's clients raise for an event that has `error`; others read its other fields.
        """
        yield from self._begin()
        if self._is_open:
            self._items[-1]["status"] = "incomplete"
        response = self._response("failed")
        response["error"] = {"code": "server_error", "message": error["message"]}
        yield self._event("response.failed", response=response)
        yield self._event("error", code=error["code"], message=error["message"], param=error["param"], error=error)

    def _events_of(self, chunk: JsonMapping) -> Iterator[JsonObject]:
        self._extras |= {name: value for name, value in chunk.items() if name in ("lora", "warning")}
        yield from self._begin()
        for choice in chunk["choices"]:
            yield from self._events_of_choice(choice)
        if "usage" in chunk:
            self._usage = _show_usage(chunk["usage"])
            yield self._event(f"response.{self._end}", response=self._response(self._end))

    def _begin(self) -> Iterator[JsonObject]:
        """Yield the first events of a stream, once."""
        if not self._num_events:
            yield self._event("response.created", response=self._response("in_progress"))
            yield self._event("response.in_progress", response=self._response("in_progress"))

    def _events_of_choice(self, choice: JsonMapping) -> Iterator[JsonObject]:
        delta, self._reason = choice["delta"], choice["finish_reason"] or ""
        open_calls, new_calls = split_calls(delta)
        for call in open_calls:
            yield from self._add_call(call)
        text, logprobs = delta.get("content") or "", choice["logprobs"]["content"] if choice["logprobs"] else []
        if text or logprobs:  # some tokens have no text of their own
            yield from self._add_text(text, logprobs)
        for call in new_calls:
            yield from self._add_call(call)
        if self._reason:
            if not self._items:
                yield from self._open_message()
            yield from self._close(self._end)

    def _add_text(self, text: str, logprobs: list[ChatToken]) -> Iterator[JsonObject]:
        if not self._is_open or self._items[-1]["type"] != "message":
            yield from self._open_message()
        part = cast(OutputMessage, self._items[-1])["content"][0]
        part["text"] += text
        self._keep_logprobs(part, logprobs)
        yield self._of_item("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _keep_logprobs(self, part: OutputText, logprobs: list[ChatToken]) -> None:
        """Add log probabilities to a text; once there are too many to be repeated, leave them out of all texts."""
        self._num_logprobs += sum(1 + len(token["top_logprobs"]) for token in logprobs)
        part["logprobs"] += logprobs
        if self._num_logprobs > MAX_ANSWER_LOGPROBS:
            for item in self._items:
                if item["type"] == "message":
                    item["content"][0]["logprobs"] = []

    def _add_call(self, call: JsonMapping) -> Iterator[JsonObject]:
        function = call["function"]
        if "id" in call:
            item: OutputCall = {
                "id": f"fc_{self._request_id}_{len(self._items)}",
                "type": "function_call",
                "call_id": call["id"],
                "name": function["name"],
                "arguments": "",
                "status": "in_progress",
            }
            yield from self._open(item)
        if function["arguments"]:
            cast(OutputCall, self._items[-1])["arguments"] += function["arguments"]
            yield self._of_item("response.function_call_arguments.delta", delta=function["arguments"])

    def _open_message(self) -> Iterator[JsonObject]:
        identity = f"msg_{self._request_id}" + (f"_{len(self._items)}" if self._items else "")
        item: OutputMessage = {
            "id": identity,
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        yield from self._open(item)
        part: OutputText = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["content"].append(part)
        yield self._of_item("response.content_part.added", content_index=0, part=deepcopy(part))

    def _open(self, item: OutputMessage | OutputCall) -> Iterator[JsonObject]:
        yield from self._close("completed")
        self._items.append(item)
        self._is_open = True
        yield self._of_item("response.output_item.added", item=deepcopy(item))

    def _close(self, status: Literal["completed", "incomplete"]) -> Iterator[JsonObject]:
        """End the open item, if there is one."""
        if not self._is_open:
            return
        item, self._is_open = self._items[-1], False
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            about = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._of_item("response.output_text.done", content_index=0, **about)
            yield self._of_item("response.content_part.done", content_index=0, part=part)
        else:
            about = {"name": item["name"], "arguments": item["arguments"]}
            yield self._of_item("response.function_call_arguments.done", **about)
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _of_item(self, kind: str, **fields: object) -> JsonObject:
        """Return an event about the last item."""
        place = {"output_index": len(self._items) - 1}
        named = {} if "item" in fields else {"item_id": self._items[-1]["id"]}
        return self._event(kind, **named, **place, **fields)

    def _event(self, kind: str, **fields: object) -> JsonObject:
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return event

    @property
    def _end(self) -> Literal["completed", "incomplete"]:
        return "incomplete" if self._reason == "length" else "completed"

    def _sampled(self, name: str) -> float:
        """Return the value of a sampling parameter that the answer was made with."""
        is_given = name in self._request.model_fields_set
        value: float = getattr(self._request, name)
        return value if is_given else self._defaults.get(name, value)

    def _response(self, status: Status) -> ResponseObject:
        request = self._request
        response: ResponseObject = {
            "id": f"resp_{self._request_id}",
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": request.model,
            "output": list(self._items),
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
            "temperature": self._sampled("temperature"),
            "text": request.text_format,
            "tool_choice": request.shown_choice,
            "tools": request.shown_tools,
            "top_logprobs": request.top_logprobs or 0,
            "top_p": self._sampled("top_p"),
            "truncation": "disabled",
            "user": request.user,
        }
        return {**response, **self._extras}  # type: ignore[typeddict-item]


def _show_usage(usage: JsonMapping) -> ResponsesUsage:
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
