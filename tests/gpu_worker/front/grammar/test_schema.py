"""Schemas of clients in the library's form: no text that the grammar allows is invalid for the schema."""

from __future__ import annotations

import json
import random
import re
import time
from decimal import Decimal
from typing import Any

import pytest

from gpu_worker.front.grammar.check import check
from gpu_worker.front.grammar.schema import parse_schema, prepared
from gpu_worker.front.request.grammar import Grammar
from tests.gpu_worker.front.grammar.small_vocabulary import allows

NUMBER, TEXT = {"type": "integer"}, {"type": "string"}


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        # `\u0066` is the letter f: the name would escape the schema of "foo".
        ({"properties": {"foo": NUMBER}, "additionalProperties": TEXT}, '{"foo":1}', '{"\\u0066oo":"x"}'),
        (TEXT, '"a\\n\\"\\\\é"', '"\\u0041"'),
        ({"type": "string", "pattern": "^\\s$"}, '"\u2003"', '"\u0085"'),
        ({"type": "string", "pattern": "^[a\\s]\\S$"}, '" x"', '"\u0085x"'),
        ({"type": "string", "pattern": "^\\s$"}, '"\ufeff"', '"a"'),
        ({"type": "string", "pattern": "^\\S$"}, '"a"', '"\ufeff"'),
        ({"type": "string", "pattern": "^[^\\x01]$"}, '"a"', '""'),
        ({"type": "string", "pattern": "^a[\\x00-\\x1f]b$"}, '"a\\tb"', '"ab"'),
        ({"type": "string", "pattern": "^.$"}, '"x"', '"\u2028"'),
        ({"type": "string", "pattern": "^[.]$"}, '"."', '"x"'),
        ({"type": "string", "pattern": "^\\.{1,2}?$"}, '".."', '"x"'),
        ({"type": "string", "pattern": "^[^\\w&&x]$"}, '"-"', '"a"'),
        ({"type": "string", "pattern": "^[a~~b]$"}, '"~"', '"c"'),
        ({"type": "string", "pattern": "^[+--]$"}, '","', '"."'),
        ({"type": "string", "pattern": "^[[:digit:]]$"}, '"d]"', '"5"'),
        ({"type": "string", "pattern": "^[^--/]$"}, '"0"', '"."'),
        ({"type": "string", "pattern": "^[+-\\s]$"}, '"-"', '"A"'),
        ({"type": "string", "pattern": "^[\\w-.]$"}, '"-"', '"+"'),
        ({"type": "string", "pattern": "^[^\\w--{]$"}, '"."', '"-"'),
        ({"type": "string", "pattern": "^[\\x41-\\x43--/]$"}, '"."', '"D"'),
        ({"type": "string", "pattern": "^\\u{2014}+$"}, '"——"', '"-"'),
        ({"patternProperties": {"^\\s$": NUMBER}, "additionalProperties": False}, '{" ":1}', '{"\u0085":1}'),
        ({"type": "object", "minProperties": 1}, '{"a":1}', "{}"),
        ({"propertyNames": TEXT, "type": "object", "additionalProperties": NUMBER}, '{"é":1}', '{"é":"x"}'),
        (
            {"type": "object", "propertyNames": {"type": "string", "enum": ["a", "b"]}, "additionalProperties": NUMBER},
            '{"b":1}',
            '{"c":1}',
        ),
        ({"type": "object", "properties": {"a": {"type": "string", "format": "password"}}}, '{"a":"x"}', '{"a":1}'),
        ({"type": "string", "format": "date"}, '"2024-02-29"', '"2024-02-31"'),
        ({"format": "date", "allOf": [{"pattern": "9$"}]}, '"2000-02-29"', '"1900-02-29"'),
        ({"type": "integer", "minimum": 0, "maximum": 2**63 - 1}, "9223372036854775807", "-1"),
        ({"type": "integer", "maximum": 1234567890123456789}, "1234567890123456768", "1234567890123456790"),
        ({"type": "number", "maximum": 0.30000000000000004}, "0.25", "0.31"),
        ({"prefixItems": [NUMBER, TEXT], "items": False, "minItems": 2, "additionalItems": False}, '[1,"a"]', "[1,2]"),
        ({"type": "array", "prefixItems": [NUMBER], "items": TEXT, "additionalItems": NUMBER}, '[1,"a"]', "[1,2]"),
        ({"type": "array", "items": [NUMBER], "additionalItems": TEXT}, '[1,"a"]', "[1,2]"),
        ({"type": "array", "items": [{"type": "string", "pattern": "^.$"}]}, '["a"]', '["\u2028"]'),
        ({"type": "array", "items": [], "additionalItems": {"pattern": "^.$"}}, '["a"]', '["\u2028"]'),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "0.00001", "0"),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5}, "0.49", "0"),
        ({"type": "number", "minimum": -0.5, "exclusiveMaximum": 0}, "-0.5", "-0"),
        ({"type": "number", "minimum": -2.5, "exclusiveMaximum": -2}, "-2.0001", "-2"),
        ({"exclusiveMinimum": 100, "maximum": 100.9}, "100.5", "100"),
        ({"type": "number", "minimum": 2, "exclusiveMinimum": True, "maximum": 2.5}, "2.5", "2"),
        ({"type": "number", "minimum": 3, "exclusiveMinimum": 2, "maximum": 3.5}, "3", "2.5"),
        ({"type": "number", "allOf": [{"exclusiveMinimum": 2}, {"maximum": 2.5}]}, "2.5", "2"),
        ({"type": "integer", "exclusiveMinimum": 0, "maximum": 3}, "1", "0"),
        ({"format": "time"}, '"22:48:59.60+01:30"', '"22:48:60Z"'),
        ({"format": "time", "minLength": 1, "maxLength": 20}, '"22:48:59.60+01:30"', '"22:48:60Z"'),
        ({"format": "date-time", "maxLength": 40}, '"2024-02-29T22:48:59Z"', '"2239-04-05t22:48:60z"'),
        ({"format": "date-time", "maxLength": 20}, '"2024-02-29T22:48:59Z"', '"2024-02-29T22:48:59.5Z"'),
        ({"format": "date-time"}, '"2024-02-29T22:48:59Z"', '"2239-04-05t22:48:60z"'),
    ],
)
def test_a_grammar_allows_what_its_schema_allows(schema: Any, valid: str, invalid: str) -> None:
    grammar = Grammar("json_schema", json.dumps(schema))
    assert check(grammar.kind, grammar.text) is None
    assert allows(grammar, valid) and not allows(grammar, invalid)


@pytest.mark.parametrize(
    ("pattern", "written", "excluded"),
    [
        (r'^[^"]$', "a\\\n\té", '"'),
        (r'^[^"\n]$', "a\\\té", '"\n'),
        (r'^[^"\\]{1,2}$', "a\n\té", '"\\'),
        (r'^[^\\/:*?"<>|]{1,12}$', "a\n\té", '"\\/'),
        (r"^[\x00-!#-\[\]-\x7f]$", "a\n\t]", '"\\é'),
        (r"^\P{P}$", "a\n\té", '"\\'),
        (r"^[^\p{P}-x]$", "a\n\té", '"\\-x'),
        (r"^\p{P}$", '"\\', "a\n"),
        (r"^\W$", '"\\\n\té', "a"),
        (r"^\D$", '"\\\n\ta', "1"),
        (r"^\S$", '"\\aé', "\n\t"),
        (r"^\s$", "\n\t ", '"\\a'),
        (r"^.$", '"\\\ta', "\n"),
        (r"^[\s\S]$", '"\\\n\ta', ""),
    ],
)
def test_a_class_gives_quotes_and_backslashes_only_where_it_has_them(pattern: str, written: str, excluded: str) -> None:
    parts = {"allOf": [{"pattern": pattern}, {"pattern": "^[^#]*$"}]}
    for schema in ({"pattern": pattern}, parts):
        grammar = Grammar("json_schema", json.dumps({"type": "string"} | schema))
        assert all(allows(grammar, json.dumps(char, ensure_ascii=False)) for char in written)
        assert not any(allows(grammar, json.dumps(char, ensure_ascii=False)) for char in excluded)
    names = Grammar("json_schema", json.dumps({"patternProperties": {pattern: NUMBER}, "additionalProperties": TEXT}))
    assert all(allows(names, json.dumps({char: "x"}, ensure_ascii=False)) for char in excluded)
    assert not any(allows(names, json.dumps({char: "x"}, ensure_ascii=False)) for char in written)


@pytest.mark.parametrize(
    ("schema", "pointer", "message"),
    [
        ({"properties": {"a": {"minProperties": 2}}}, "/properties/a", "minProperties 2 cannot be guaranteed"),
        ({"minProperties": 3, "required": ["a"], "properties": {"a": NUMBER}}, "", "lower it to 2"),
        ({"items": {"propertyNames": {"pattern": "^a"}}}, "/items", "propertyNames"),
        ({"items": {"format": "json-pointer"}}, "/items", "json-pointer"),
        ({"items": {"pattern": "^a{1,2}+$"}}, "/items", "a quantifier behind a quantifier"),
        ({"items": {"pattern": "^a???$"}}, "/items", "a quantifier behind a quantifier"),
        ({"items": {"pattern": "^[^]a]$"}}, "/items", r"an empty class; write \\\] for"),
        ({"items": {"pattern": "^a\\x01b$"}}, "/items", r"control character '\\x01' in the pattern"),
        ({"items": {"pattern": "^a\x01b$"}}, "/items", r"control character '\\x01' in the pattern"),
        ({"items": {"pattern": "^,\\v$"}}, "/items", r"control character '\\x0b'"),
        ({"items": {"pattern": "(a|\\u007f)"}}, "/items", r"control character '\\x7f'"),
        ({"items": {"pattern": "^a\\u{1}?b$"}}, "/items", r"control character '\\x01'"),
        ({"items": {"pattern": "^a[\\x00-\\x07\\v]?b$"}}, "/items", r"control character '\\x00'"),
        ({"items": [{"pattern": "a\\v"}]}, "/items/0", r"control character '\\x0b'"),
        ({"patternProperties": {"\\x02": NUMBER}}, "", r"control character '\\x02'"),
        ({"properties": {"a": {"enum": ["a\x00b"]}}}, "/properties/a", r"control character '\\x00'"),
        ({"items": {"const": [{"a": {"b\x7f": "x"}}]}}, "/items", r"control character '\\x7f'"),
        ({"items": {"enum": [1, 1234567890123456789]}}, "/items", "number 1234567890123456789 .* or a string"),
        ({"items": {"const": {"a": [984.6056941533499]}}}, "/items", r"number 984\.6056941533499"),
        ({"items": {"const": -(2**63)}}, "/items", "number -9223372036854775808"),
        ({"items": {"type": "integer", "minimum": 1234567890123456789}}, "/items", "in `minimum`"),
        ({"items": {"type": "number", "maximum": 2**60}}, "/items", "in `maximum`"),
        ({"items": {"type": "integer", "exclusiveMaximum": 2**60}}, "/items", "in `exclusiveMaximum`"),
        ({"items": {"type": "number", "exclusiveMinimum": 984.6056941533499}}, "/items", "in `exclusiveMinimum`"),
        ({"items": {"type": "number", "multipleOf": 2**53 + 1}}, "/items", "in `multipleOf`"),
    ],
)
def test_a_schema_that_could_give_invalid_texts_is_refused(schema: Any, pointer: str, message: str) -> None:
    refusal = check("json_schema", json.dumps(schema))
    assert refusal is not None and re.search(message, refusal.error) and refusal.pointer == pointer


_CHANCE = random.Random(0)
_NUMBERS = [
    *(
        0,
        -0.0,
        0.1,
        1e16,
        -1e-300,
        5e-324,
        2**53 + 1,
        2**63 - 1,
        2**64 - 1,
        10**20,
        5300 * 10**26,
        9.37090692733342e-11,
    ),
    *(_CHANCE.randint(-(2**64), 2**64) for _ in range(30)),
    *(_CHANCE.random() * 10 ** _CHANCE.randint(-20, 20) for _ in range(60)),
    *(round(_CHANCE.random() * 10_000, 6) for _ in range(10)),
]


def test_a_fixed_number_is_repeated_or_refused() -> None:
    num_refused = 0
    for number in _NUMBERS:
        schema = {"const": number}
        if check("json_schema", json.dumps(schema)) is not None:
            num_refused += 1
            continue
        alone = Grammar("json_schema", json.dumps(schema))
        call = Grammar("tool_calls", json.dumps({"rules": "start: schema_0\n", "schemas": {"": schema}}))
        text = f"{Decimal(str(number)):f}".removesuffix(".0")
        assert allows(alone, text) and allows(call, text), number
    assert 20 < num_refused < 60


@pytest.mark.parametrize("part", ["[", "[a", "[\\u{41}", "\\u{41}", "\\u{", "a{1", "(?"])
def test_the_time_to_read_a_pattern_grows_with_its_length_only(part: str) -> None:
    began = time.process_time()
    prepared({"pattern": "[" + part * 10_000})
    prepared({"pattern": part * 10_000})
    assert time.process_time() - began < 2


def test_values_are_not_read_as_schemas() -> None:
    schema = {"const": {"format": "password"}, "enum": [{"pattern": "\\s"}], "default": {"propertyNames": {}}}
    assert prepared(schema) == schema


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"not": ' * 5000 + "1" + "}" * 5000])
def test_a_text_that_is_no_schema_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"JSON|deeply"):
        parse_schema(text)
