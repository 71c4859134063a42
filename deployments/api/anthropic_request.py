"""The requests of `/v1/messages`: a chat in the shape of Anthropic's Messages API."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from deployments.api.base import (
    NOT_SERVED_IN_ANTHROPIC,
    Label,
    Passing,
    Text,
    TolerantRequest,
    check_goes_with,
    problem,
    unsupported,
)
from deployments.api.completions import (
    MAX_MESSAGES,
    GenerationRequest,
    PromptRequest,
    Question,
    StopString,
)
from deployments.api.messages import (
    MAX_PARTS,
    MAX_TOOLS,
    CallId,
    ChosenFunction,
    FunctionDefinition,
    TextParts,
    ToolChoice,
    as_parts,
    check_tools,
    make_tools,
)
from deployments.api.structured import Schema, TextFormat
from deployments.errors import RequestInvalid
from gpu_worker.front.request.prompts import Message
from gpu_worker.front.request.request import MAX_STOPS, SamplingParams
from gpu_worker.front.request.tools import ToolCall, Tools

_UNREAD = ("thinking", "redacted_thinking")  # blocks of other models, which no prompt template reads
_BLOCKS = ("text", "tool_use", "tool_result", *_UNREAD)
_CHOICES: dict[str, Literal["auto", "required", "function", "none"]] = {
    "auto": "auto",
    "any": "required",
    "tool": "function",
    "none": "none",
}


class ContentBlock(TolerantRequest):
    """A text, a call of a tool, its result, or `thinking` of another model."""

    type: Literal["text", "tool_use", "tool_result", "thinking", "redacted_thinking"]
    text: Text | None = None
    id: CallId | None = None
    name: Label | None = None
    input: Schema | None = None
    tool_use_id: CallId | None = None
    content: TextParts = Field(default=[])
    is_error: bool = False
    """Of a result: its text in the prompt begins with `Error: `."""

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        if isinstance(kind := data.get("type"), str) and kind not in _BLOCKS:
            raise unsupported("", f"blocks of type {kind[:64]!r}")
        return {"type": data["type"]} if data.get("type") in _UNREAD else data

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needed = {"text": ("text",), "tool_use": ("id", "name"), "tool_result": ("tool_use_id",)}.get(self.type, ())
        for name in needed:
            if getattr(self, name) is None:
                raise problem(name, "is missing")
        return self

    def arguments(self, path: str) -> str:
        """Return the input of a call as JSON text. `path`: of this block. Raises: RequestInvalid."""
        try:
            return json.dumps(self.input or {}, allow_nan=False)
        except (RecursionError, ValueError) as exc:
            param = f"{path}.input"
            raise RequestInvalid(f"{param}: is nested too deeply, or has numbers that JSON lacks", param) from exc


Blocks = Annotated[list[ContentBlock], Field(max_length=MAX_PARTS)]


class AnthropicMessage(TolerantRequest):
    role: Literal["user", "assistant", "system"]
    content: Annotated[
        list[ContentBlock],
        Field(fail_fast=True, max_length=MAX_PARTS),
        BeforeValidator(as_parts, json_schema_input_type=Text | Blocks),
    ]


class AnthropicTool(FunctionDefinition):
    """A tool that the client runs."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")]
    parameters: Schema | None = Field(alias="input_schema")
    type: Literal["custom"] = "custom"

    @model_validator(mode="before")
    @classmethod
    def _of_the_client(cls, data: object) -> object:
        if isinstance(data, dict) and data.get("type") not in (None, "custom"):
            raise unsupported("", f"tools of type {str(data['type'])[:64]!r}")
        return data


class AnthropicChoice(TolerantRequest):
    type: Literal["auto", "any", "tool", "none"]
    name: Label | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _names_a_tool(self) -> Self:
        check_goes_with("name", self.name is not None, self.type, "tool")
        return self


class OutputConfig(TolerantRequest):
    format: TextFormat | None = None


class Conversation(TolerantRequest):
    """The fields that are rendered into a prompt."""

    not_served: ClassVar[Passing] = NOT_SERVED_IN_ANTHROPIC
    declines: ClassVar[Mapping[str, str]] = {"tools": "tool_choice"}

    messages: Annotated[list[AnthropicMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    """Messages of `user` and `assistant`; content is a text or a list of blocks of the types `text`, `tool_use` and
    `tool_result`. Blocks of `thinking` are not read; images and documents are refused."""
    system: TextParts | None = None
    """A text or a list of text blocks before the conversation."""
    tools: Annotated[list[AnthropicTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    """Tools that the client runs: `name`, `description` and `input_schema`. Tools that a server runs are refused."""
    tool_choice: AnthropicChoice | None = None
    """`{"type": "auto"}`, `any`, `none`, or `{"type": "tool", "name": ...}`; `disable_parallel_tool_use`: at most one
    call in an answer."""

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if not self.turns():
            raise problem("messages", "has no text")
        check_tools([tool.name for tool in self.tools or ()], self._choice, "name")
        return self

    @property
    def _choice(self) -> ToolChoice | None:
        if self.tool_choice is None:
            return None
        function = None if self.tool_choice.name is None else ChosenFunction(name=self.tool_choice.name)
        return ToolChoice(type=_CHOICES[self.tool_choice.type], function=function)

    def used_tools(self) -> Tools | None:
        """Return the functions that the answer may call, None without any. Raises: GrammarInvalid."""
        if not self.tools:
            return None
        functions = [tool.function(f"tools.{place}.input_schema") for place, tool in enumerate(self.tools)]
        is_single = self.tool_choice is not None and self.tool_choice.disable_parallel_tool_use
        return make_tools(functions, self._choice, False if is_single else None)

    def turns(self) -> tuple[Message, ...]:
        """Return the turns of the conversation. Results of tools come before the text of their message.

        Raises: PydanticCustomError for a result without its call; RequestInvalid for an input that JSON cannot hold.
        """
        system = "\n".join(block.text for block in self.system or ())
        turns = [Message("system", system)] if system else []
        names: dict[str, str] = {}
        for place, message in enumerate(self.messages):
            turns += self._results(place, message, names)
            text = "\n".join(block.text for block in message.content if block.text is not None)
            calls = tuple(
                ToolCall(block.id or "", block.name or "", block.arguments(f"messages.{place}.content.{number}"))
                for number, block in enumerate(message.content)
                if block.type == "tool_use"
            )
            names |= {call.id: call.name for call in calls}
            if text or calls:
                turns.append(replace(Message(message.role, text), tool_calls=calls))
        return tuple(turns)

    def _results(self, place: int, message: AnthropicMessage, names: Mapping[str, str]) -> Iterator[Message]:
        for number, block in enumerate(message.content):
            if block.type != "tool_result":
                continue
            call_id = block.tool_use_id or ""
            if call_id not in names:
                path = f"messages.{place}.content.{number}.tool_use_id"
                raise problem(path, "no message before this one has a tool_use with this id")
            text = ("Error: " if block.is_error else "") + "\n".join(part.text for part in block.content)
            yield Message("tool", text, (), call_id, names[call_id])


class MessagesRequest(Conversation, GenerationRequest):
    """`POST /v1/messages`"""

    always_shows_usage: ClassVar[bool] = True
    format_field: ClassVar[str] = "output_config.format"

    max_tokens: int = Field(ge=1)
    """The most new tokens."""
    stop_sequences: Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    """The answer ends before the first of them."""
    stream: bool = False
    """Send server-sent events, from `message_start` to `message_stop`."""
    output_config: OutputConfig | None = None
    """`{"format": {"type": "json_schema", "schema": {...}}}`, see structured output."""
    n: Literal[1] = 1
    """A message has one answer."""

    @model_validator(mode="after")
    def _ends_before_the_answer(self) -> Self:
        if self.messages[-1].role == "assistant" and self.turns()[-1].role == "assistant":
            what = "answers that the client begins: end messages with a message of the user"
            raise unsupported(f"messages.{len(self.messages) - 1}", what)
        return self

    @property
    def _format(self) -> TextFormat | None:
        return None if self.output_config is None else self.output_config.format

    @property
    def set_fields(self) -> Set[str]:
        return super().set_fields | ({"stop"} if self.stop_sequences is not None else set())

    @property
    def num_logprobs(self) -> int | None:
        return None

    def sampling(self) -> SamplingParams:
        sampling = super().sampling()
        return sampling if self.stop_sequences is None else replace(sampling, stop=tuple(self.stop_sequences))

    def questions(self) -> list[Question]:
        """Return the conversation as one question."""
        return [self._ask(self.turns(), self.used_tools())]


class CountTokensRequest(Conversation, PromptRequest):
    """`POST /v1/messages/count_tokens`"""

    def question(self) -> Question:
        """Return the conversation as a question, whose adapters may name a template. Raises: GrammarInvalid."""
        return self._ask(self.turns(), self.used_tools())
