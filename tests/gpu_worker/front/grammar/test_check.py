"""Refusals by a check, with the place; and the process that limits it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from gpu_worker.errors import GrammarInvalid
from gpu_worker.front.grammar.check import check
from gpu_worker.front.grammar.compiler import CheckProcess
from gpu_worker.front.request.grammar import ANY_OBJECT, Grammar
from tests.gpu_worker.front.grammar.schemas import random_schema
from tests.soak import Scale

NOT = {"not": {"type": "string"}}


def schema(content: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(content))


@pytest.mark.parametrize(
    ("content", "pointer", "message"),
    [
        (NOT, "", "not"),
        ({"type": "object", "properties": {"a": {"type": "array", "items": NOT}}}, "/properties/a/items", "not"),
        ({"type": "object", "properties": {"x/y~": NOT}}, "/properties/x~1y~0", "not"),
        ({"anyOf": [{"type": "string"}, {"type": "string", "pattern": "a(b"}]}, "/anyOf/1", "unclosed group"),
        ({"$defs": {"n": NOT}, "properties": {"a": {"$ref": "#/$defs/n"}}}, "/$defs/n", "not"),
        ({"type": "strin"}, "", "strin"),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}, "/properties/a", "none"),
        ({"x-guidance": {"lenient": True}, **NOT}, "", "not"),
    ],
)
def test_a_schema_that_cannot_be_compiled_is_refused_with_the_place(content: Any, pointer: str, message: str) -> None:
    refusal = check("json_schema", json.dumps(content))
    assert refusal is not None and refusal.pointer == pointer and message in refusal.error


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", "{bad"),
        Grammar("json_schema", "[1]"),
        Grammar("json_schema", "[" * 30_000),
        Grammar("json_schema", '{"type": "object", "properties": ' * 1000 + "{}" + "}" * 1000),
        Grammar("regex", "a(b"),
        Grammar("regex", "(?=a)b"),
        Grammar("regex", "(" * 20_000 + ")" * 20_000),
        Grammar("grammar", "start: nothing"),
        Grammar("grammar", 'start: "a" start'),
        Grammar("grammar", "root ::= ("),
        Grammar("grammar", 'start: "a" <end>'),
    ],
    ids=lambda grammar: f"{grammar.kind}-{grammar.text[:20]}",
)
def test_an_invalid_grammar_is_refused(grammar: Grammar) -> None:
    refusal = check(grammar.kind, grammar.text)
    assert refusal is not None and 0 < len(refusal.error) <= 500


def test_random_schemas_pass(scale: Scale) -> None:
    for seed in range(scale.pick("schemas", small=20, full=500)):
        assert check("json_schema", json.dumps(random_schema(seed))) is None
    assert check("json_schema", ANY_OBJECT) is None


HOSTILE = [
    schema({"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(10, 60)]}),
    schema({"type": "integer", "multipleOf": 999_983}),
    Grammar("regex", "((((a{100}){100}){100}){100}){100}"),
    Grammar("grammar", 'start: A\nA: B{1000}\nB: C{1000}\nC: D{1000}\nD: "x"{1000}'),
]


def test_a_grammar_that_needs_minutes_is_refused_in_seconds(scale: Scale) -> None:
    for hostile in HOSTILE[: scale.pick("grammars", small=1, full=len(HOSTILE))]:
        with pytest.raises(GrammarInvalid):
            CheckProcess().run(hostile)


def test_the_process_gives_the_result_of_the_check() -> None:
    CheckProcess().run(schema(random_schema(0)))
    with pytest.raises(GrammarInvalid) as refused:
        CheckProcess().run(schema({"type": "object", "properties": {"a": NOT}}))
    assert refused.value.pointer == "/properties/a"


def test_a_wrong_schema_of_many_parts_is_refused_with_its_error() -> None:
    """Compiling each of them with its definitions takes several seconds."""
    part = {"type": "object", "properties": {"a": {"type": "string"}}}
    with pytest.raises(GrammarInvalid, match="Invalid type: strin") as refused:
        CheckProcess().run(schema({"type": "strin", "$defs": {f"d{number}": part for number in range(500)}}))
    assert refused.value.pointer == ""


def test_the_process_imports_neither_the_store_nor_numpy() -> None:
    """Every new grammar waits for it, and these took three quarters of its time."""
    program = "import sys, llguidance, gpu_worker.front.grammar.check; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert not {"lora_store", "numpy", "gpu_worker.errors"} & set(found.stdout.split())


def test_a_killed_check_does_not_start() -> None:
    process = CheckProcess()
    process.kill()
    with pytest.raises(GrammarInvalid, match="cancelled"):
        process.run(schema({}))
