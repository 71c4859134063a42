"""The request of `/v1/responses`: a chat in another shape. Nothing is stored, so it carries the whole conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from deployments.api.base import (
    INPUT_PARTS,
    ITEMS,
    NOT_SERVED_IN_RESPONSES,
    TOOLS_AND_CHOICES,
    Label,
    Passing,
    Text,
    TolerantRequest,
    check_goes_with,
    problem,
    unsupported,
)
from deployments.api.completions import MAX_MESSAGES, GenerationRequest, Metadata, Question, StreamOptions
from deployments.api.messages import (
    MAX_PARTS,
    MAX_TOOLS,
    CallId,
    ChosenFunction,
    FunctionDefinition,
    ToolChoice,
    check_tools,
    function_alone,
    known_choice,
    make_tools,
    word_or,
)
from deployments.api.structured import TextFormat
from deployments.json_types import JsonMapping, JsonObject
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import MAX_LOGPROBS
from gpu_worker.front.request.tools import ToolCall, Tools

LOGPROBS = "message.output_text.logprobs"
_MAX_INCLUDED = 16
_INSTEAD = {
    "item_reference": "references to stored items: send the items themselves, as clients do with store: false",
}


class InputPart(TolerantRequest):
    """A text of a message: `output_text` where an earlier answer is sent back."""

    type: Literal["input_text", "output_text", "text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        if data.get("type") in INPUT_PARTS:
            raise unsupported("", f"parts of type {data['type']!r}")
        return _without(data, "annotations", "logprobs")


def _without(data: JsonMapping, *names: str) -> JsonObject:
    """Return `data` without fields of earlier answers, which clients send back and which say nothing here."""
    return {name: value for name, value in data.items() if name not in names}


def _as_parts(value: object) -> object:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


def _as_items(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Parts = Annotated[list[InputPart], Field(max_length=MAX_PARTS)]
_TextParts = Annotated[
    list[InputPart],
    Field(fail_fast=True, max_length=MAX_PARTS),
    BeforeValidator(_as_parts, json_schema_input_type=Text | Parts),
]


class InputItem(TolerantRequest):
    """A message, a call of a function, its output, or `reasoning` of another model, which no prompt template reads."""

    type: Literal["message", "reasoning", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: _TextParts = Field(default=[])
    call_id: CallId | None = None
    name: Label | None = None
    arguments: Text | None = None
    output: _TextParts = Field(default=[])

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        kind = data.get("type")
        if kind in ITEMS:
            raise unsupported("", _INSTEAD.get(kind, f"items of type {kind!r}"))
        return {"type": kind} if kind == "reasoning" else _without(data, "id", "status", "phase")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for name in _NEEDED[self.type]:
            if name not in self.model_fields_set:
                raise problem(name, "is missing")
        return self


_NEEDED = {
    "message": ("role", "content"),
    "reasoning": (),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
}


def turns_of_items(items: Sequence[InputItem]) -> tuple[Message, ...]:
    """Return the turns of a conversation: calls belong to the assistant's turn before them, if there is one.

    Raises: PydanticCustomError for an output without its call.
    """
    turns: list[Message] = []
    names: dict[str, str] = {}
    for place, item in enumerate(items):
        call_id, text = item.call_id or "", "".join(part.text for part in item.content or item.output)
        if item.role is not None:
            turns.append(Message("system" if item.role == "developer" else item.role, text))
        elif item.type == "function_call":
            names[call_id] = item.name or ""
            is_continued = bool(turns) and turns[-1].role == "assistant"
            turn = turns.pop() if is_continued else Message("assistant", "")
            call = ToolCall(call_id, names[call_id], item.arguments or "{}")
            turns.append(replace(turn, tool_calls=(*turn.tool_calls, call)))
        elif item.type == "function_call_output":
            if call_id not in names:
                raise problem(f"input.{place}.call_id", "no item before this one is a call with this id")
            turns.append(Message("tool", text, (), call_id, names[call_id]))
    return tuple(turns)


class ResponsesTool(FunctionDefinition):
    type: Literal["function"]

    _kind = model_validator(mode="before")(function_alone)


class ResponsesChoice(TolerantRequest):
    """Whether an answer calls functions: a word, or the function that it calls."""

    type: Literal["none", "auto", "required", "function"]
    name: Label | None = None

    _kind = model_validator(mode="before")(known_choice)

    @model_validator(mode="after")
    def _names_a_function(self) -> Self:
        check_goes_with("name", self.name is not None, self.type, "function")
        return self

    def choice(self) -> ToolChoice:
        """Return the choice as in a chat."""
        function = None if self.name is None else ChosenFunction(name=self.name)
        return ToolChoice(type=self.type, function=function)


Items = Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES)]


class TextOptions(TolerantRequest):
    not_served: ClassVar[Passing] = {}

    format: TextFormat | None = None


class ResponsesRequest(GenerationRequest):
    """`POST /v1/responses`"""

    not_served: ClassVar[Passing] = NOT_SERVED_IN_RESPONSES
    declines: ClassVar[Mapping[str, str]] = TOOLS_AND_CHOICES
    always_shows_usage: ClassVar[bool] = True
    format_field: ClassVar[str] = "text.format"

    input: Annotated[
        list[InputItem],
        Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES),
        BeforeValidator(_as_items, json_schema_input_type=Text | Items),
    ]
    """A text, or a list of messages with the roles `system`, `developer`, `user` and `assistant`; content is a text or
    a list of text parts. It is the whole conversation. Items of the type `reasoning` are not read."""
    instructions: Text | None = None
    """A system message before the others."""
    previous_response_id: Label | None = None
    """Refused with 400 `previous_response_not_found`, because nothing is stored."""
    max_output_tokens: int | None = Field(default=None, ge=1)
    """The most new tokens. Takes precedence over `max_tokens`."""
    text: TextOptions | None = None
    """`{"format": {"type": "json_object"}}`, or `json_schema` with `name` and `schema`, see structured output."""
    include: Annotated[list[Label], Field(fail_fast=True, max_length=_MAX_INCLUDED)] | None = None
    """`message.output_text.logprobs` reports log probabilities. Other values have no effect."""
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Alternatives for each token; more than 0 also reports log probabilities."""
    stream: bool = False
    """Send server-sent events with types, from `response.created` to `response.completed` or `response.incomplete`."""
    stream_options: StreamOptions | None = None
    """Accepted; the usage is always in the last event."""
    user: Label | None = None
    """Repeated in the response."""
    metadata: Metadata | None = None
    """Repeated in the response."""
    n: Literal[1] = 1
    """A response has one answer."""
    tools: Annotated[list[ResponsesTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    """Functions that the answer may call: `{"type": "function", "name": ..., "parameters": {...}}`. Other types are
    refused."""
    tool_choice: Annotated[ResponsesChoice, word_or(ResponsesChoice)] | None = None
    """`auto`, `none`, `required`, or `{"type": "function", "name": ...}`."""
    parallel_tool_calls: bool | None = None
    """`false`: at most one call in an answer."""

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if not turns_of_items(self.input):
            raise problem("input", "has no message")
        check_tools([tool.name for tool in self.tools or ()], self._choice, "name")
        return self

    @property
    def _format(self) -> TextFormat | None:
        return None if self.text is None else self.text.format

    @property
    def _choice(self) -> ToolChoice | None:
        return None if self.tool_choice is None else self.tool_choice.choice()

    def used_tools(self) -> Tools | None:
        if not self.tools:
            return None
        functions = [tool.function(f"tools.{place}.parameters") for place, tool in enumerate(self.tools)]
        return make_tools(functions, self._choice, self.parallel_tool_calls)

    @property
    def shown_tools(self) -> list[JsonObject]:
        """The tools, as the response repeats them."""
        return [tool.model_dump(exclude_none=True, exclude=set(tool.model_extra or ())) for tool in self.tools or ()]

    @property
    def shown_choice(self) -> str | JsonObject:
        """The choice of tools, as the response repeats it."""
        if self.tool_choice is None or self.tool_choice.type != "function":
            return "auto" if self.tool_choice is None else self.tool_choice.type
        return {"type": "function", "name": self.tool_choice.name}

    @property
    def text_format(self) -> JsonObject:
        """The format that the text has, in whichever field the request gives it."""
        given, other = self._format, self.structured_outputs or self.response_format
        if other is not None and (given is None or given.type == "text"):
            return {"format": other.as_text_format()}
        return {"format": {"type": "text"} if given is None else given.shown()}

    @property
    def limit_field(self) -> str:
        return "max_tokens" if self.max_output_tokens is None else "max_output_tokens"

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.top_logprobs or LOGPROBS in (self.include or ()) else None

    def questions(self) -> list[Question]:
        """Return the conversation as one question, with `instructions` as its first message."""
        turns = turns_of_items(self.input)
        if self.instructions:
            turns = (Message("system", self.instructions), *turns)
        return [self._ask(turns, self.used_tools())]
