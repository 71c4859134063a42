"""The request of `/v1/responses`: a chat in another shape. Nothing is stored, so it carries the whole conversation."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from deployments.api.base import (
    INPUT_PARTS,
    ITEMS,
    NOT_SERVED_IN_RESPONSES,
    Passing,
    TolerantRequest,
    problem,
    unsupported,
    without_unserved,
)
from deployments.api.completions import (
    MAX_MESSAGES,
    GenerationRequest,
    Label,
    Question,
    Text,
    question_text,
)
from deployments.api.messages import MAX_PARTS
from deployments.api.structured import TextFormat
from deployments.json_types import JsonMapping, JsonObject
from gpu_worker.request.grammar import Grammar
from gpu_worker.request.prompts import Message
from gpu_worker.request.request import MAX_LOGPROBS

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


class InputItem(TolerantRequest):
    """One message, or a `reasoning` item, which another model made and no prompt template reads."""

    type: Literal["message", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Annotated[
        list[InputPart],
        Field(fail_fast=True, max_length=MAX_PARTS),
        BeforeValidator(_as_parts, json_schema_input_type=Text | Parts),
    ] = Field(default=[])

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
        for name in ("role", "content"):
            if self.type == "message" and name not in self.model_fields_set:
                raise problem(name, "is missing")
        return self

    def message(self) -> Message | None:
        """Return the message, None for an item without one."""
        if self.role is None:
            return None
        text = "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


Items = Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES)]


class TextOptions(TolerantRequest):
    format: TextFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: object) -> object:
        return without_unserved(data, {})


class ResponsesRequest(GenerationRequest):
    """`POST /v1/responses`"""

    not_served: ClassVar[Passing] = NOT_SERVED_IN_RESPONSES

    input: Annotated[
        list[InputItem],
        Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES),
        BeforeValidator(_as_items, json_schema_input_type=Text | Items),
    ]
    instructions: Text | None = None
    previous_response_id: Label | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    text: TextOptions | None = None
    include: Annotated[list[Label], Field(fail_fast=True, max_length=_MAX_INCLUDED)] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    n: Literal[1] = 1
    parallel_tool_calls: bool | None = None  # concerns tools, which are not supported

    @model_validator(mode="before")
    @classmethod
    def _without_declined(cls, data: Any) -> Any:
        """Drop tools where the client asks for an answer without them."""
        is_declined = isinstance(data, dict) and data.get("tool_choice") == "none"
        return _without(data, "tools") if is_declined else data

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if not self._turns():
            raise problem("input", "has no message")
        if self._has_format and (self.structured_outputs is not None or self.response_format is not None):
            raise problem("text.format", "the request gives the format of the answer twice; keep one of them")
        self._check_paths(1)
        return self

    @property
    def _has_format(self) -> bool:
        return self.text is not None and self.text.format is not None and self.text.format.type != "text"

    @property
    def text_format(self) -> JsonObject:
        """The format of the text, as the response repeats it."""
        chosen = None if self.text is None or self.text.format is None else self.text.format
        shown = {"type": "text"} if chosen is None else chosen.model_dump(by_alias=True, exclude_none=True)
        return {"format": shown}

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_output_tokens is None else self.max_output_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.top_logprobs or LOGPROBS in (self.include or ()) else None

    def _grammar(self) -> Grammar | None:
        if self._has_format:
            assert self.text is not None and self.text.format is not None
            return self.text.format.grammar()
        return super()._grammar()

    def _turns(self) -> tuple[Message, ...]:
        return tuple(message for item in self.input if (message := item.message()) is not None)

    def questions(self) -> list[Question]:
        """Return the conversation as one question, with `instructions` as its first message."""
        turns = self._turns()
        if self.instructions is not None:
            turns = (Message("system", self.instructions), *turns)
        return [self._question(0, turns, question_text(turns))]
