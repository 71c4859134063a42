"""Structured output in a request: `response_format` of the OpenAI API, and `structured_outputs` of vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from deployments.api.base import (
    NOT_SERVED_IN_STRUCTURED,
    Label,
    Passing,
    Text,
    TolerantRequest,
    at_most,
    check_goes_with,
    problem,
)
from deployments.json_types import JsonObject
from gpu_worker.errors import GrammarInvalid
from gpu_worker.front.request.grammar import ANY_OBJECT, MAX_CHOICES, MAX_GRAMMAR_CHARS, Grammar

MAX_SCHEMA_DEPTH = (
    128  # about what the compiler of grammars reads; answers of `/v1/responses` repeat it in other objects
)
_MAX_KEYS = 1000  # at the top level of a schema
GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]
Schema = Annotated[dict[str, Any], Field(max_length=_MAX_KEYS), BeforeValidator(at_most(_MAX_KEYS))]
Choice = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]


class JsonSchemaFormat(TolerantRequest):
    """A schema of the OpenAI API. It is always enforced, whatever `strict` says."""

    name: Label | None = None
    description: Text | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None

    def shown(self) -> JsonObject:
        """Return the fields that are set, as a response repeats them."""
        return self.model_dump(by_alias=True, exclude_none=True)


class ResponseFormat(TolerantRequest):
    """The format of a chat's answer. `schema` is llama.cpp's, LoRAX's and Fireworks' spelling of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: Schema | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if self.schema_ is None:
            check_goes_with("json_schema", self.json_schema is not None, self.type, "json_schema")
        elif self.type == "text":
            raise problem("schema", "goes with type 'json_object' or 'json_schema' only; type is 'text'")
        elif self.json_schema is not None:
            raise problem("schema", "json_schema gives the schema too; keep one of them")
        return self

    def grammar(self) -> Grammar | None:
        """Return the grammar of the answer, or None for any text. Raises: GrammarInvalid."""
        if self.schema_ is not None:
            return of_schema(self.schema_, "response_format.schema")
        if self.json_schema is not None:
            return of_schema(self.json_schema.schema_, "response_format.json_schema.schema")
        return Grammar("json_schema", ANY_OBJECT, "response_format") if self.type == "json_object" else None

    def as_text_format(self) -> JsonObject:
        """Return this format as `text.format` of `/v1/responses`."""
        if self.schema_ is not None:
            return {"type": "json_schema", "schema": self.schema_}
        return {"type": self.type} | ({} if self.json_schema is None else self.json_schema.shown())


class TextFormat(JsonSchemaFormat):
    """The format of a text in other APIs: the fields of a chat's `json_schema` are in the format itself."""

    type: Literal["text", "json_object", "json_schema"]
    schema_: Schema | None = Field(default=None, alias="schema")  # type: ignore[assignment]

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        check_goes_with("schema", self.schema_ is not None, self.type, "json_schema")
        return self

    def grammar(self, param: str) -> Grammar | None:
        """Return the grammar of the answer, or None for any text. `param`: this field. Raises: GrammarInvalid."""
        if self.schema_ is not None:
            return of_schema(self.schema_, f"{param}.schema")
        return Grammar("json_schema", ANY_OBJECT, param) if self.type == "json_object" else None


class StructuredOutputs(TolerantRequest):
    """One grammar of the answer, in vLLM's spelling."""

    not_served: ClassVar[Passing] = NOT_SERVED_IN_STRUCTURED

    json_: Schema | GrammarText | None = Field(default=None, alias="json")
    regex: GrammarText | None = None
    choice: Annotated[list[Choice], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: GrammarText | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _one_grammar(self) -> Self:
        names = [name.rstrip("_") for name in type(self).model_fields if getattr(self, name) not in (None, False)]
        if len(names) != 1:
            given = ", ".join(names) or "none"
            raise problem("", f"needs exactly one of json, regex, choice, grammar and json_object, got {given}")
        return self

    def as_grammar(self) -> Grammar:
        """Return the grammar of the answer. Raises: GrammarInvalid."""
        path = "structured_outputs"
        if self.regex is not None:
            return Grammar("regex", self.regex, f"{path}.regex")
        if self.choice is not None:
            return Grammar.of_choices(self.choice, f"{path}.choice")
        if self.grammar is not None:
            return Grammar("grammar", self.grammar, f"{path}.grammar")
        if self.json_ is not None:
            return of_schema(self.json_, f"{path}.json")
        return Grammar("json_schema", ANY_OBJECT, f"{path}.json_object")

    def as_text_format(self) -> JsonObject:
        """Return the format as `text.format` of `/v1/responses`, which names JSON only. Leave out a schema as text."""
        if self.json_ is None:
            return {"type": "json_object" if self.json_object else "text"}
        return {"type": "json_schema"} | ({} if isinstance(self.json_, str) else {"schema": self.json_})


def of_schema(schema: Mapping[str, Any] | str, param: str) -> Grammar:
    """Return the grammar of a schema, given as an object or as its JSON text. Raises: GrammarInvalid."""
    return Grammar("json_schema", schema if isinstance(schema, str) else dump_schema(schema, param), param)


def dump_schema(schema: Mapping[str, Any], param: str) -> str:
    """Return a schema as JSON text. Raises: GrammarInvalid for a deep one, and for what JSON cannot hold."""
    if _is_deep(schema):
        problem = f"it is nested too deeply: at most {MAX_SCHEMA_DEPTH} levels are allowed; flatten it"
        raise GrammarInvalid(problem, param=param)
    try:
        text = json.dumps(schema, allow_nan=False)
        if "\\ud" in text:  # half of a surrogate pair, or a whole one
            json.dumps(schema, ensure_ascii=False).encode()
    except ValueError as exc:
        problem = "it has numbers or lone surrogates (\\ud800) that JSON lacks"
        raise GrammarInvalid(problem, param=param) from exc
    return text


def _is_deep(schema: Mapping[str, Any]) -> bool:
    """Return whether a schema has more than `MAX_SCHEMA_DEPTH` levels of objects and lists."""
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        items = chain.from_iterable(item.values() if isinstance(item, dict) else item for item in level)
        level = [item for item in items if isinstance(item, (dict, list))]
    return bool(level)
