"""The grammar that a request asks for, in both spellings, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.api.anthropic_request import MessagesRequest
from deployments.api.base import MAX_LABEL_CHARS, NOT_SERVED_IN_STRUCTURED, ignored_fields
from deployments.api.completions import parse
from deployments.api.responses_request import ResponsesRequest
from deployments.api.structured import MAX_SCHEMA_DEPTH
from deployments.errors import RequestInvalid, Unsupported
from gpu_worker.errors import GrammarInvalid, SamplingInvalid
from gpu_worker.front.request.grammar import MAX_GRAMMAR_CHARS, Grammar

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
ANY = '{"type": "object"}'


def asked(**fields: Any) -> Grammar | None:
    grammars = [parse(request | fields).sampling().grammar for request in (CHAT, {"prompt": "Once"})]
    assert grammars[0] == grammars[1]
    return grammars[0]


def with_schema(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", **fields}}}


def schema_beside(kind: str, **fields: Any) -> dict[str, Any]:
    """Return a format with the schema beside its type, as clients of llama.cpp, LoRAX and Fireworks send it."""
    return {"response_format": {"type": kind, "schema": SCHEMA, **fields}}


@pytest.mark.parametrize(
    ("fields", "grammar", "param"),
    [
        (with_schema(schema=SCHEMA, strict=True), ("json_schema", json.dumps(SCHEMA)), "response_format.json_schema"),
        (with_schema(schema=SCHEMA, strict=False), ("json_schema", json.dumps(SCHEMA)), "response_format.json_schema"),
        ({"response_format": {"type": "json_object"}}, ("json_schema", ANY), "response_format"),
        (schema_beside("json_object"), ("json_schema", json.dumps(SCHEMA)), "response_format.schema"),
        (schema_beside("json_schema"), ("json_schema", json.dumps(SCHEMA)), "response_format.schema"),
        ({"structured_outputs": {"json": SCHEMA}}, ("json_schema", json.dumps(SCHEMA)), "structured_outputs.json"),
        ({"structured_outputs": {"json": ANY}}, ("json_schema", ANY), "structured_outputs.json"),
        ({"structured_outputs": {"json_object": True}}, ("json_schema", ANY), "structured_outputs.json_object"),
        ({"structured_outputs": {"regex": "a+"}}, ("regex", "a+"), "structured_outputs.regex"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, ("choice", '["a", "b"]'), "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "root ::= [a]"}}, ("grammar", "root ::= [a]"), "structured_outputs"),
        ({"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}}, ("regex", "a"), "structured"),
    ],
)
def test_both_spellings_give_a_grammar_that_names_its_field(
    fields: dict[str, Any], grammar: tuple[Any, str], param: str
) -> None:
    found = asked(**fields)
    assert found == Grammar(*grammar)
    assert found is not None and found.param.startswith(param)


def test_a_schema_may_have_a_long_description_in_every_spelling() -> None:
    """Clients send the docstring of a class as the description."""
    described = {"name": "a", "description": "d" * (MAX_LABEL_CHARS + 1), "schema": SCHEMA}
    form = {"type": "json_schema", **described}
    requests = (
        parse(CHAT | with_schema(**described)),
        ResponsesRequest.model_validate({"input": "Hi", "text": {"format": form}}),
        MessagesRequest.model_validate(CHAT | {"max_tokens": 9, "output_config": {"format": form}}),
    )
    for request in requests:
        assert request.sampling().grammar == Grammar("json_schema", json.dumps(SCHEMA))


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}, {"structured_outputs": None}])
def test_any_text_has_no_grammar(fields: dict[str, Any]) -> None:
    assert asked(**fields) is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema: is missing"),
        (
            {"response_format": {"type": "text", "json_schema": {"schema": {}}}},
            "response_format.json_schema: goes with type 'json_schema' only",
        ),
        ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "response_format.json_schema"),
        (schema_beside("text"), "response_format.schema: goes with type 'json_object' or 'json_schema' only"),
        (
            schema_beside("json_schema", json_schema={"schema": {}}),
            "response_format.schema: json_schema gives the schema too",
        ),
        (with_schema(), "response_format.json_schema.schema"),
        (with_schema(schema=[1]), "response_format.json_schema.schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice.1"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a" * (MAX_GRAMMAR_CHARS + 1)}}, "structured_outputs.regex"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ],
)
def test_a_malformed_format_is_refused_at_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestInvalid) as refused:
        parse(CHAT | fields)
    name, _, message = param.partition(": ")
    assert refused.value.param == name and message in str(refused.value)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("regex", "structured_outputs.regex"),
        ("ebnf", "structured_outputs.grammar"),
        ("grammar", "structured_outputs.grammar"),
        ("json_schema", "response_format or structured_outputs.json"),
    ],
)
def test_a_format_beside_the_other_fields_is_refused_with_what_to_use_instead(name: str, instead: str) -> None:
    for request in (CHAT, {"prompt": "Once"}):
        with pytest.raises(Unsupported, match=f"support {name}.*; use {instead}") as refused:
            parse(request | {name: "a"})
        assert refused.value.param == name
        assert ignored_fields(parse(request | {name: ""})) == (), "it requests nothing"


@pytest.mark.parametrize("name", sorted(NOT_SERVED_IN_STRUCTURED))
def test_another_form_of_the_grammar_is_refused_by_name(name: str) -> None:
    with pytest.raises(Unsupported) as refused:
        parse(CHAT | {"structured_outputs": {"regex": "a", name: True}})
    assert refused.value.param == f"structured_outputs.{name}"


def test_fields_of_a_grammar_that_request_nothing_or_are_unknown_are_accepted() -> None:
    given = {"regex": "a", "json_object": False, "disable_any_whitespace": False, "backend": "guidance"}
    assert asked(structured_outputs=given) == Grammar("regex", "a")
    assert ignored_fields(parse(CHAT | {"structured_outputs": given})) == ("structured_outputs.backend",)


def deep_schema(num_levels: int) -> dict[str, Any]:
    """Return a schema with this many levels, objects and lists in turn."""
    schema: dict[str, Any] = {} if num_levels % 2 else {"enum": []}
    for _ in range((num_levels - 1) // 2):
        schema = {"anyOf": [schema]}
    return schema


def test_a_schema_of_the_most_levels_is_not_refused() -> None:
    for num_levels in (MAX_SCHEMA_DEPTH - 1, MAX_SCHEMA_DEPTH):
        schema = deep_schema(num_levels)
        assert asked(**with_schema(schema=schema)) == Grammar("json_schema", json.dumps(schema))


def test_a_large_or_deep_schema_is_refused_before_it_is_sent_to_a_worker() -> None:
    deep = [deep_schema(num_levels) for num_levels in (MAX_SCHEMA_DEPTH + 1, MAX_SCHEMA_DEPTH + 2, 20_000)]
    for schema in ({"enum": ["x" * MAX_GRAMMAR_CHARS]}, *deep):
        with pytest.raises(GrammarInvalid) as refused:
            asked(**with_schema(schema=schema))
        assert refused.value.param == "response_format.json_schema.schema"


@pytest.mark.parametrize("odd", ["\ud800", {"\ud800": 1}, float("inf"), float("nan")], ids=ascii)
def test_a_schema_that_json_cannot_hold_is_refused(odd: Any) -> None:
    for fields in (with_schema(schema={"enum": [odd]}), {"structured_outputs": {"json": {"enum": [odd]}}}):
        with pytest.raises(GrammarInvalid, match="numbers or lone surrogates"):
            asked(**fields)
    text = "\U0001f600\u00e4"
    assert asked(**with_schema(schema={"title": text})) == Grammar("json_schema", json.dumps({"title": text}))


@pytest.mark.parametrize("name", ["min_tokens", "ignore_eos"])
def test_the_grammar_alone_ends_the_answer(name: str) -> None:
    with pytest.raises(SamplingInvalid, match=name):
        asked(**{name: 1 if name == "min_tokens" else True, "structured_outputs": {"regex": "a"}})
