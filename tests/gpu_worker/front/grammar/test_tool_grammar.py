"""The texts that a grammar of calls allows, and what the parser makes of them."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest

from gpu_worker.errors import GrammarInvalid, SamplingInvalid
from gpu_worker.front.grammar.check import check
from gpu_worker.front.grammar.library import compile_matcher
from gpu_worker.front.grammar.tool_grammar import tool_grammar
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.front.request.tool_parser import ToolCallParser
from gpu_worker.front.request.tools import HERMES, LLAMA3_JSON, Function, ToolForm, Tools, joined_calls
from tests.gpu_worker.chat_templates import FORM, call, written
from tests.gpu_worker.front.grammar.small_vocabulary import BYTES, END, allows

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/Name"}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city"],
    "$defs": {"Name": {"enum": ["Rome", "Z\u00fcrich"]}},
}
WEATHER, NOW = Function("get_weather", "", json.dumps(CITY)), Function("now")
STRICT = Function("get_weather", "", json.dumps(CITY), strict=True)
ANSWER = Grammar("json_schema", '{"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}')


def grammar_of(form: ToolForm, *functions: Function, answer: Grammar | None = None, **options: Any) -> Grammar:
    grammar = tool_grammar(Tools(functions, **options), form, answer)
    assert grammar is not None and check(grammar.kind, grammar.text) is None
    return grammar


ROME, NOTHING = '{"city": "Rome", "days": 3}', "{}"


@FORM
def test_an_answer_that_must_call_is_calls_that_follow_their_schemas(form: ToolForm) -> None:
    grammar = grammar_of(form, WEATHER, NOW, required=True)
    rome, now = call(form, "get_weather", ROME), call(form, "now", NOTHING)
    assert all(allows(grammar, written(form, *calls)) for calls in ([rome], [now], [rome, now, rome]))
    wrong = [call(form, "get_weather", '{"city": "Bern"}'), call(form, "now", '{"a": 1}'), call(form, "later", NOTHING)]
    assert not any(allows(grammar, text) for text in ("", "Hello", *[written(form, each) for each in wrong]))
    named = grammar_of(form, WEATHER, NOW, required=True, only="now")
    assert allows(named, written(form, now)) and not allows(named, written(form, rome))


@FORM
def test_an_answer_that_may_call_is_free_unless_a_function_is_strict(form: ToolForm) -> None:
    assert tool_grammar(Tools((WEATHER, NOW)), form, None) is None
    grammar = grammar_of(form, STRICT, NOW)
    bern, any_now = call(form, "get_weather", '{"city": "Bern"}'), call(form, "now", '{"a": [1]}')
    rome = call(form, "get_weather", ROME)
    assert all(allows(grammar, text) for text in ("", "Hello.\n", written(form, rome), written(form, any_now)))
    assert not allows(grammar, written(form, bern))
    if not form.is_bare:
        assert allows(grammar, f"I look: {written(form, rome)} and {written(form, rome)} done")
        assert not allows(grammar, f"I look: {written(form, bern)}")


@FORM
def test_a_response_format_alone_is_an_alternative_to_calls(form: ToolForm) -> None:
    grammar = grammar_of(form, WEATHER, answer=ANSWER)
    rome = call(form, "get_weather", ROME)
    text = form.marker + rome if form.is_bare else written(form, rome)
    assert allows(grammar, text) and allows(grammar, '{"ok": true}')
    assert not allows(grammar, "Hello") and not allows(grammar, '{"ok": 1}')
    required = grammar_of(form, WEATHER, answer=ANSWER, required=True)
    assert allows(required, written(form, rome)) and not allows(required, '{"ok": true}')
    with pytest.raises(SamplingInvalid, match=r"structured_outputs\.regex cannot be combined with tools"):
        tool_grammar(Tools((NOW,)), form, Grammar("regex", "a", "structured_outputs.regex"))


@FORM
def test_whatever_the_grammar_allows_is_read_as_valid_calls(form: ToolForm) -> None:
    grammar = grammar_of(form, WEATHER, NOW, required=True)
    chance = np.random.default_rng(5)
    for _ in range(12):
        matcher, tokens = compile_matcher(grammar.kind, grammar.text, BYTES), list[int]()
        while not matcher.is_stopped():
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            allowed = np.flatnonzero(bits)
            token = END if END in allowed else int(chance.choice(allowed))
            matcher.consume_token(token)
            tokens.append(token)
        text = bytes(tokens[:-1]).decode()
        content, pieces, reason = ToolCallParser(form, {"get_weather", "now"}, is_constrained=True).read(text, "stop")
        calls = joined_calls(pieces)
        assert (content, reason) == ("", "tool_calls") and calls, text
        for found in calls:
            schema = CITY if found.name == "get_weather" else json.loads(NOW.parameters)
            jsonschema.validate(json.loads(found.arguments), schema)


def test_undeclared_arguments_are_left_out_unless_the_schema_speaks_of_them() -> None:
    open_schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": True}
    closed = {"properties": {"a": {"type": "integer"}}}
    for schema, is_allowed in ((open_schema, True), (closed, False)):
        grammar = grammar_of(HERMES, Function("f", "", json.dumps(schema)), required=True)
        assert allows(grammar, written(HERMES, call(HERMES, "f", '{"a": 1, "b": 2}'))) == is_allowed
        assert not allows(grammar, written(HERMES, call(HERMES, "f", "[]")))


@pytest.mark.parametrize(
    ("schema", "allowed", "refused"),
    [
        ({"propertyNames": {"enum": ["en", "de"]}}, '{"en": 1}', '{"fr": 1}'),
        ({"required": ["a"]}, '{"a": 1}', "{}"),
        ({"properties": {"a": {"type": "string"}}, "required": ["a", "b"]}, '{"a": "x", "b": 1}', '{"a": "x"}'),
        ({"required": ["a"]}, '{"a": 1}', '{"a": 1, "b": 2}'),
        ({"const": {"a": 1}}, '{"a": 1}', "{}"),
        ({"enum": [{"a": 1}, {"a": 2}]}, '{"a": 2}', '{"a": 3}'),
        ({"required": ["a"], "minProperties": 1}, '{"a": 1}', '{"a": 1, "b": 2}'),
        ({"minProperties": 1}, '{"a": 1}', "{}"),
        ({"minProperties": 1, "properties": {"a": {}}}, '{"a": 1}', '{"b": 1}'),
        ({}, "{}", '{"a": 1}'),
    ],
    ids=str,
)
def test_arguments_that_the_schema_asks_for_are_allowed(schema: dict[str, Any], allowed: str, refused: str) -> None:
    grammar = grammar_of(HERMES, Function("f", "", json.dumps({"type": "object"} | schema)), required=True)
    assert check(grammar.kind, grammar.text) is None
    assert allows(grammar, written(HERMES, call(HERMES, "f", allowed)))
    assert not allows(grammar, written(HERMES, call(HERMES, "f", refused)))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": ["object", "null"], "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {"anyOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"type": "null"}]},
        {"enum": [{"a": 1}, None, "a"]},
        {"type": ["null", "object"], "enum": [{"a": 1}, None]},
    ],
    ids=str,
)
def test_arguments_are_an_object(schema: dict[str, Any]) -> None:
    text = json.dumps(schema)
    for grammar in (
        grammar_of(HERMES, Function("f", "", text), required=True),
        grammar_of(HERMES, Function("f", "", text, strict=True)),
    ):
        assert allows(grammar, written(HERMES, call(HERMES, "f", '{"a": 1}')))
        assert not any(allows(grammar, written(HERMES, call(HERMES, "f", text))) for text in ("null", '"a"', "{}"))


@pytest.mark.parametrize("names", ["string", "array", ["string", "null"], []], ids=str)
def test_parameters_that_are_no_object_are_refused_with_their_place(names: str | list[str]) -> None:
    wrong = Function("f", "", json.dumps({"type": names}))
    with pytest.raises(GrammarInvalid, match=r"arguments are an object, not .*; use the type 'object'") as refused:
        tool_grammar(Tools((NOW, wrong), required=True), HERMES, None)
    assert (refused.value.param, refused.value.pointer) == ("tools", "/1/function/parameters")
    assert tool_grammar(Tools((NOW, wrong)), HERMES, None) is None


def test_parameters_with_other_values_only_are_refused() -> None:
    for schema in ({"const": "x"}, {"enum": [None, "x"]}, {"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}}):
        grammar = tool_grammar(Tools((Function("f", "", json.dumps(schema)),), required=True), HERMES, None)
        assert grammar is not None
        refusal = check(grammar.kind, grammar.text)
        assert refusal is not None and refusal.pointer == "/0/function/parameters"


@pytest.mark.parametrize(
    "odd",
    [{"properties": [], "required": ["a"]}, {"required": "a"}, {"required": [{}]}, {"minProperties": "1"}],
    ids=str,
)
def test_keywords_of_other_types_are_refused(odd: dict[str, Any]) -> None:
    grammar = tool_grammar(Tools((Function("f", "", json.dumps(odd)),), required=True), HERMES, None)
    assert grammar is not None
    assert check(grammar.kind, grammar.text) is not None


def test_a_schema_that_cannot_be_compiled_is_refused_with_its_place() -> None:
    bad = {"type": "object", "properties": {"a/b": {"type": "string", "pattern": "(?=x)"}}}
    grammar = tool_grammar(Tools((NOW, Function("f", "", json.dumps(bad))), required=True), HERMES, None)
    assert grammar is not None and grammar.param == "tools"
    refusal = check(grammar.kind, grammar.text)
    assert refusal is not None and refusal.pointer == "/1/function/parameters/properties/a~1b"


def test_a_bare_answer_begins_as_no_call_does() -> None:
    grammar = grammar_of(LLAMA3_JSON, STRICT)
    assert not any(allows(grammar, text) for text in ('{"ok": true}', " {}", "<tool>"))
