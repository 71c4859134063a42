"""The messages and the tools of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from deployments.api.base import (
    MAX_LABEL_CHARS,
    NOT_SERVED_IN_MESSAGES,
    PARTS,
    ROLES,
    Label,
    Passing,
    Text,
    TolerantRequest,
    check_goes_with,
    problem,
    unsupported,
)
from deployments.api.structured import Schema, dump_schema
from deployments.field_problems import did_you_mean
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.tools import NO_PARAMETERS, Function, ToolCall, Tools

MAX_PARTS = 256  # of one message
MAX_TOOLS = 128  # and calls of one message
_OTHER_CHOICES = {
    "allowed_tools": "send only the allowed tools, with tool_choice 'auto' or 'required'",
    "custom": "only functions are supported",
}
CallId = Annotated[str, Field(min_length=1, max_length=MAX_LABEL_CHARS)]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class TextPart(TolerantRequest):
    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, data: object) -> object:
        if isinstance(data, dict) and data.get("type") in PARTS:
            raise unsupported("", f"parts of type {data['type']!r}")
        return data


Parts = Annotated[list[TextPart], Field(max_length=MAX_PARTS)]


def as_parts(value: object) -> object:
    """Return a list with one part for a text."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


TextParts = Annotated[
    list[TextPart],
    Field(fail_fast=True, max_length=MAX_PARTS),
    BeforeValidator(as_parts, json_schema_input_type=Text | Parts),
]
"""A text, or a list of text parts."""


class CalledFunction(TolerantRequest):
    name: Label
    arguments: Text = "{}"


class ToolCallGiven(TolerantRequest):
    """A call in an earlier answer."""

    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(TolerantRequest):
    not_served: ClassVar[Passing] = NOT_SERVED_IN_MESSAGES

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: TextParts = Field(default=[])
    name: Label | None = None
    tool_calls: Annotated[list[ToolCallGiven], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_call_id: CallId | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: object) -> object:
        if isinstance(data, dict) and data.get("role") in ROLES:
            raise unsupported("role", f"messages of role {data['role']!r}: use role 'tool'")
        return data

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise problem("tool_calls", "is allowed only in messages of role 'assistant'")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            rule = "is required in messages of role 'tool' and not allowed in others"
            raise problem("tool_call_id", f"{rule}; it names the call that the message answers")
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise problem("content", "is missing")
        return self

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)

    def message(self) -> Message:
        role = "system" if self.role == "developer" else self.role
        calls = [
            ToolCall(call.id, call.function.name, call.function.arguments or "{}") for call in self.tool_calls or ()
        ]
        return Message(role, self.text, tuple(calls), name=self.name or "")


def check_results(messages: list[ChatMessage]) -> list[ChatMessage]:
    """Refuse a result without its call. Raises: PydanticCustomError."""
    known: set[str] = set()
    for place, message in enumerate(messages):
        if message.tool_call_id is not None and message.tool_call_id not in known:
            raise problem(f"{place}.tool_call_id", "no message before this one has a call with this id")
        known |= {call.id for call in message.tool_calls or ()}
    return messages


def make_turns(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """Return the turns of a conversation. A result has the name of the function that was called."""
    turns, names = [message.message() for message in messages], dict[str, str]()
    for place, message in enumerate(messages):
        if message.tool_call_id is not None:
            call_id = message.tool_call_id
            turns[place] = Message("tool", message.text, (), call_id, names.get(call_id, ""))
        names |= {call.id: call.name for call in turns[place].tool_calls}
    return tuple(turns)


class FunctionDefinition(TolerantRequest):
    """A function that the client can run. With `strict`, its arguments always follow the schema."""

    name: FunctionName
    description: Text | None = None
    parameters: Schema | None = None
    strict: bool | None = None

    def function(self, path: str) -> Function:
        """Return the function. Raises: GrammarInvalid for a schema that JSON cannot hold."""
        parameters = NO_PARAMETERS if self.parameters is None else dump_schema(self.parameters, path)
        return Function(self.name, self.description or "", parameters, bool(self.strict))


def function_alone(data: object) -> object:
    """Refuse tools that are not functions. Raises: PydanticCustomError."""
    if isinstance(data, dict) and data.get("type", "function") != "function":
        raise unsupported("", f"tools of type {str(data['type'])[:64]!r}")
    return data


class Tool(TolerantRequest):
    type: Literal["function"]
    function: FunctionDefinition

    _kind = model_validator(mode="before")(function_alone)


class ChosenFunction(TolerantRequest):
    name: Label


def known_choice(data: object) -> object:
    """Refuse choices that this server does not make. Raises: PydanticCustomError."""
    if isinstance(data, dict) and isinstance(kind := data.get("type"), str) and kind in _OTHER_CHOICES:
        raise unsupported("", f"choices of type {kind!r}: {_OTHER_CHOICES[kind]}")
    return data


def word_or(choice: type[BaseModel]) -> BeforeValidator:
    """Accept a word in place of a `choice` of this type without a function."""

    def as_choice(value: object) -> object:
        return {"type": value} if isinstance(value, str) else value

    return BeforeValidator(as_choice, json_schema_input_type=Literal["none", "auto", "required"] | choice)


class ToolChoice(TolerantRequest):
    """Whether an answer calls functions: a word, or the function that it calls."""

    type: Literal["none", "auto", "required", "function"]
    function: ChosenFunction | None = None

    _kind = model_validator(mode="before")(known_choice)

    @model_validator(mode="after")
    def _names_a_function(self) -> Self:
        check_goes_with("function", self.function is not None, self.type, "function")
        return self


def check_tools(names: Sequence[str], choice: ToolChoice | None, field: str = "function.name") -> None:
    """Refuse functions of one name, and the choice of an unknown one. `field`: what holds a name in the request.

    Raises: PydanticCustomError.
    """
    for place, name in enumerate(names):
        if name in names[:place]:
            raise problem(f"tools.{place}.{field}", f"another function has the name {name!r}")
    if choice is not None and choice.type in ("required", "function") and not names:
        raise problem("tool_choice", "needs tools")
    only = None if choice is None or choice.function is None else choice.function.name
    if only is not None and only not in names:
        message = f"tools has no function {only!r}{did_you_mean(only, names)}"
        raise problem(f"tool_choice.{field}", message)


def make_tools(functions: Sequence[Function], choice: ToolChoice | None, is_parallel: bool | None) -> Tools:
    """Return the functions that an answer may call, and those that it must call."""
    is_required = choice is not None and choice.type in ("required", "function")
    only = None if choice is None or choice.function is None else choice.function.name
    return Tools(tuple(functions), is_required, only, is_parallel)
