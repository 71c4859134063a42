"""The grammar of an answer that calls functions, in the form of its model."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from gpu_worker.errors import GrammarInvalid, SamplingInvalid
from gpu_worker.front.request.grammar import ANY_OBJECT, Grammar
from gpu_worker.front.request.tools import Function, ToolForm, Tools

_OPEN = {
    "additionalProperties",
    "patternProperties",
    "propertyNames",
    "unevaluatedProperties",
    "$ref",
    "allOf",
    "anyOf",
    "oneOf",
    "const",
    "enum",
}
"""Keywords of a schema that may allow arguments which `properties` does not declare."""


def tool_grammar(tools: Tools, form: ToolForm, answer: Grammar | None) -> Grammar | None:
    """Return the grammar of an answer with these tools, None for one that the model may write as it likes.

    - An answer that must call follows the schemas of all functions.
    - An answer that may call follows the schemas of the strict ones, where there are any; other arguments are any
      object. It is text with calls in it, or, if `answer` is its grammar, calls or what that allows.

    Raises: GrammarInvalid; SamplingInvalid for an `answer` that is not a JSON schema.
    """
    is_forced = tools.is_forced
    if answer is None and not tools.have_grammar:
        return None
    places = [n for n, function in enumerate(tools.functions) if tools.only in (None, function.name)]
    pointers = {n: f"/{n}/function/parameters" for n in places}
    schemas = {pointer: _make_schema(tools.functions[n], is_forced, pointer) for n, pointer in pointers.items()}
    if form.is_bare and answer is not None and not is_forced:
        form = replace(form, opening=form.marker)  # else the answer's own object could not be distinguished from a call
    rules = [_calls(form, [tools.functions[n] for n in places])]
    if is_forced:
        rules.append("start: calls")
    elif answer is not None:
        _require_schema(answer)
        rules.append(f"start: calls | schema_{len(schemas)}")
        schemas[""] = json.loads(answer.text)
    else:
        rules.append(_text_with_calls(form))
    text = json.dumps({"rules": "\n".join([*rules, ""]), "schemas": schemas})
    return Grammar("tool_calls", text, "tools")


def _require_schema(answer: Grammar) -> None:
    if answer.kind != "json_schema":
        raise SamplingInvalid(
            f"{answer.param} cannot be combined with tools unless it is a JSON schema; use response_format, or"
            " tool_choice 'none'",
            answer.param,
        )


def _make_schema(function: Function, is_forced: bool, pointer: str) -> dict[str, Any]:
    """Return the schema of the function's arguments, without undeclared ones: a weak model might never end them."""
    if not is_forced and not function.strict:
        return dict(json.loads(ANY_OBJECT))
    schema = _require_object(json.loads(function.parameters), pointer)
    if _OPEN & schema.keys():
        return schema
    declared, required, least = schema.get("properties", {}), schema.get("required", []), schema.get("minProperties")
    if not isinstance(declared, dict) or not isinstance(required, list):
        return schema  # refused when the grammar is compiled
    more: dict[str, Any] = {name: {} for name in required if isinstance(name, str) and name not in declared}
    schema |= {"properties": declared | more} if more else {}
    is_open = isinstance(least, int) and least > len(declared) + len(more)
    return schema | ({} if is_open else {"additionalProperties": False})


def _require_object(schema: dict[str, Any], pointer: str) -> dict[str, Any]:
    """Return the schema for objects only: other arguments are no call."""
    names = schema.get("type", "object")
    if "object" not in (names if isinstance(names, list) else [names]):
        raise GrammarInvalid(
            f"arguments are an object, not {json.dumps(names)}; use the type 'object'", pointer, "tools"
        )
    return schema | {"type": "object"}


def _calls(form: ToolForm, functions: list[Function]) -> str:
    """Return the rules of one or more calls: `calls`, and `rest`, which is what follows the marker."""
    bodies = [_body(form, function.name, place) for place, function in enumerate(functions)]
    repeated = f"({_quoted(form.separator)} call)*"
    parts = [
        f"calls: {_quoted(form.opening)} call {repeated} {_quoted(form.closing)}",
        f"rest: {_quoted(form.opening.removeprefix(form.marker))} call {_rest_separator(form)} {_quoted(form.closing)}",
        "call: " + " | ".join(f"call_{place}" for place in range(len(bodies))),
        *[f"call_{place}: {body}" for place, body in enumerate(bodies)],
    ]
    return "\n".join(parts)


def _rest_separator(form: ToolForm) -> str:
    """Return how further calls follow in the middle of text: none where each begins with the marker."""
    return "" if form.marker in form.separator else f"({_quoted(form.separator)} call)*"


def _body(form: ToolForm, name: str, place: int) -> str:
    if form.arguments_key is None:
        return f"{_quoted(name + form.before_arguments)} schema_{place}"
    head = f'{{"name": "{name}", "{form.arguments_key}": '
    return f'{_quoted(head)} schema_{place} "}}"'


def _text_with_calls(form: ToolForm) -> str:
    """Return the rules of an answer that may call.

    The lazy lexeme ends at the first marker, and calls must follow it.
    """
    if form.is_bare:
        return "start: calls | PLAIN\nPLAIN: /([^{< \\t\\r\\n](.|\\n)*)?/"
    lazy = f"to_marker[lazy]: TEXT {_quoted(form.marker)}"
    return f"start: (to_marker rest)* end\nend: TEXT\n{lazy}\nTEXT: /(.|\\n)*/"


def _quoted(text: str) -> str:
    return json.dumps(text) if text else ""
