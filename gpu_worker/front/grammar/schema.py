"""JSON schemas as the grammar library needs them: every text that it then allows is valid for the client's schema."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from gpu_worker.front.grammar.exact_numbers import (
    require_exact_bounds,
    require_exact_value,
    with_inclusive_bounds,
)

_MAPS = ("$defs", "definitions", "properties", "patternProperties", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLE = ("items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else")
# The formats of the specification. The library enforces most of them, and refuses the others.
_STANDARD_FORMATS = frozenset(
    {
        *("date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6"),
        *("uri", "uri-reference", "iri", "iri-reference", "uuid", "uri-template", "json-pointer"),
        *("relative-json-pointer", "regex"),
    }
)
_LEAP_YEAR = r"(\d\d(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)"
_DATE = rf"^(\d{{4}}-(0[13-9]|1[0-2])|\d{{4}}-02-([01]\d|2[0-8])|{_LEAP_YEAR}-02-29)"
# The library allows 29 February in every year, and second 60 at every minute. Searching for the seconds at any place
# would be too complex for it with a length beside.
_STRICTER = {"date": (_DATE,), "time": (r"^.{6}[0-5]",), "date-time": (_DATE, r"^.{17}[0-5]")}
# ECMA-262's white space, which JSON schemas mean by \s; the library's has U+0085, and not U+FEFF.
_SPACES = r"\t-\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
# The library leaves these out of strings and patterns, as JSON has no short escape for them.
_UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
# The library writes a class of all control characters as every escape, also \" and \\ where the class excludes them.
_WRITABLE = r"[^\x00-\x07\x0b\x0e-\x1f\x7f]"
_UNWRITABLE_CLASS = re.compile(r"(?:[\x00-\x07](?:-[\x00-\x07])?|[\x0e-\x1f](?:-[\x0e-\x1f])?|[\x0b\x7f])+")
_NEW_LINES = r"\n\r\u2028\u2029"  # which ECMA-262's `.` leaves out; the library's leaves out \n only
_CLASSES = {".": rf"[^{_NEW_LINES}]", r"\s": f"[{_SPACES}]", r"\S": f"[^{_SPACES}]"}
_CLASS_ESCAPE = re.compile(r"\\[dDsSwWpP]")
_NAMED_CHARACTERS = {r"\v": "\v", r"\a": "\a"}
_CODE_POINT = re.compile(r"\\[uxU]\{?([0-9A-Fa-f]+)\}?")
_ESCAPE = r"\\(?:[ux]\{\w+\}|u\w{4}|x\w\w|U\w{8}|[pP]\{[^{}\[\]\\]*\}|[pP]\w|.)"
_MEMBER = re.compile(rf"{_ESCAPE}|.", re.DOTALL)
# Each character is tried a bounded number of times, also in a pattern that is wrong.
_PATTERN_PART = re.compile(
    rf"{_ESCAPE}|(?P<opening>\[\^?)(?P<members>(?>{_ESCAPE}|[^\]\\])*+)(?P<closing>\]?)"
    r"|(?P<quantifier>(?:[*+?]|\{\d+(?:,\d*)?\})\??)|\(\?|.",
    re.DOTALL,
)


def subschemas(schema: Mapping[str, Any], pointer: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every schema inside this one with its JSON pointer, innermost first, and then this one."""
    for path, part in _inner(schema):
        if isinstance(part, dict):
            yield from subschemas(part, f"{pointer}/{path}")
    yield pointer, dict(schema)


def _inner(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in _MAPS:
        if isinstance(found := schema.get(name), dict):
            yield from ((f"{name}/{key.replace('~', '~0').replace('/', '~1')}", part) for key, part in found.items())
    for name in _LISTS:
        if isinstance(found := schema.get(name), list):
            yield from ((f"{name}/{place}", part) for place, part in enumerate(found))
    yield from ((name, schema[name]) for name in _SINGLE if name in schema)


def parse_schema(text: str) -> Any:
    """Return the schema of a client in the form for the library. Raises: ValueError with what to change."""
    try:
        return prepared(json.loads(text))
    except json.JSONDecodeError as exc:
        raise ValueError(f"it is not valid JSON: {exc}") from exc
    except RecursionError as exc:
        raise ValueError("it is nested too deeply") from exc


def prepared(schema: Any) -> Any:
    """Return the schema, and those in it, in the form for the library.

    - Formats that the specification does not know are annotations: they are left out. Dates and times are made exact.
    - Exclusive bounds that the library would not follow become inclusive ones.
    - `propertyNames` that every name fulfils is left out. Names from a list become `properties`.
    - Patterns are written out so that they mean what ECMA-262 says.

    Raises: ValueError for `minProperties` where equal names could be counted, for values that cannot be written, for
    numbers that the library would change, and for patterns that it would read in another way.
    """
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for name in _MAPS:
        if isinstance(found.get(name), dict):
            found[name] = {key: prepared(part) for key, part in found[name].items()}
    for name in _LISTS:
        if isinstance(found.get(name), list):
            found[name] = [prepared(part) for part in found[name]]
    found |= {name: prepared(found[name]) for name in _SINGLE if name in found}
    if not isinstance(found.get("items"), list):
        found.pop("additionalItems", None)  # it has no meaning there, and the library would ignore `prefixItems`
    if isinstance(found.get("format"), str) and found["format"] not in _STANDARD_FORMATS:
        del found["format"]
    if isinstance(parts := found.get("allOf", []), list) and (stricter := _STRICTER.get(str(found.get("format")))):
        found["allOf"] = [*parts, *({"pattern": pattern} for pattern in stricter)]
    if isinstance(found.get("pattern"), str):
        found["pattern"] = with_ecma_meaning(found["pattern"])
    if isinstance(found.get("patternProperties"), dict):
        parts = found["patternProperties"].items()
        found["patternProperties"] = {with_ecma_meaning(pattern): part for pattern, part in parts}
    found = _without_property_names(found)
    _require_distinct_names(found)
    _require_writable([found.get("enum"), found.get("const")])
    found = with_inclusive_bounds(found)
    require_exact_bounds(found)
    return found


def with_ecma_meaning(pattern: str) -> str:
    """Return the pattern with what the library reads in another way than ECMA-262 written out. Raises: ValueError.

    The library has classes inside of classes, operators between them such as `&&`, and repeated quantifiers. It reads a
    `]` at the beginning of a class as a character.
    """
    found, is_quantified = list[str](), False
    for part in _PATTERN_PART.finditer(pattern):
        is_quantifier = part["quantifier"] is not None
        if is_quantifier and is_quantified:
            raise ValueError(f"the pattern {pattern!r} has a quantifier behind a quantifier")
        if part[0] in ("[]", "[^]"):
            remedy = r"write \] for the character ] in a class, or [\s\S] for any character"
            raise ValueError(f"the pattern {pattern!r} has an empty class; {remedy}")
        is_class = part["opening"] is not None
        if part["opening"] != "[^":
            _require_writable_characters(part["members"] if is_class else part[0], pattern)
        if not is_class:
            found.append(_write_part(part[0]))
        else:
            found.append(_write_class(part["opening"], part["members"], part["closing"]))
        is_quantified = is_quantifier
    return "".join(found)


def _require_writable_characters(members: str, pattern: str) -> None:
    """Refuse a character, or a class, that is only control characters."""
    characters = "".join(_read_character(member) for member in _MEMBER.findall(members))
    if _UNWRITABLE_CLASS.fullmatch(characters):
        raise ValueError(f"the control character {characters[0]!r} in the pattern {pattern!r} is not supported")


def _read_character(member: str) -> str:
    """Return the character that a member of a class means, or the member itself if it means others."""
    if (code_point := _CODE_POINT.fullmatch(member)) and (number := int(code_point[1], 16)) <= sys.maxunicode:
        return chr(number)
    return _NAMED_CHARACTERS.get(member, member)


def _write_part(part: str) -> str:
    """Return what is no class in brackets: one character or escape, or a quantifier."""
    if part in _CLASSES:
        return _CLASSES[part]
    return _write_class("[", part, "]") if _CLASS_ESCAPE.match(part) else part


def _write_class(opening: str, members: str, closing: str) -> str:
    """Return a class in brackets without the characters that cannot be written."""
    text = opening + _write_members(members) + closing
    return f"[{text}&&{_WRITABLE}]" if closing else text


def _write_members(members: str) -> str:
    """Return the members of a class with dashes that make no range, and the library's other operators, escaped."""
    found, previous, may_be_operator, follows_operator = list[str](), "", False, False
    for member in _MEMBER.findall(members):
        is_operator = member == "-" and may_be_operator
        makes_range = is_operator and not _CLASS_ESCAPE.match(previous)
        if follows_operator and _CLASS_ESCAPE.match(member):
            found[-1] = r"\-"
        is_escaped = member in ("[", "&", "~") or (member == "-" and not makes_range)
        found.append(f"\\{member}" if is_escaped else _CLASSES[member] if member in (r"\s", r"\S") else member)
        may_be_operator = not is_operator and not follows_operator
        previous, follows_operator = member, is_operator
    return "".join(found)


def _without_property_names(schema: dict[str, Any]) -> dict[str, Any]:
    names = schema.get("propertyNames")
    rest = {key: part for key, part in schema.items() if key != "propertyNames"}
    if names in (True, {}, {"type": "string"}):
        return rest
    allowed = names.get("enum") if isinstance(names, dict) and names.keys() <= {"enum", "type"} else None
    is_alone = not schema.keys() & {"properties", "patternProperties"}
    if not isinstance(allowed, list) or not is_alone or not all(isinstance(name, str) for name in allowed):
        return schema
    value = schema.get("additionalProperties", {})
    return rest | {"properties": dict.fromkeys(allowed, value), "additionalProperties": False}


def _require_distinct_names(schema: Mapping[str, Any]) -> None:
    """Refuse `minProperties` that equal names could fulfil: only declared names are never repeated."""
    least, required = schema.get("minProperties"), schema.get("required")
    is_open = schema.get("additionalProperties") is not False or bool(schema.get("patternProperties"))
    num_required = len(required) if isinstance(required, list) else 0
    if is_open and isinstance(least, int | float) and least > num_required + 1:
        raise ValueError(
            f"minProperties {least} cannot be guaranteed: name the properties in `required`, or lower it to"
            f" {num_required + 1}"
        )


def _require_writable(value: Any) -> None:
    """Refuse control characters and inexact numbers anywhere in a fixed value."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        require_exact_value(value)
    if isinstance(value, str) and (found := _UNWRITABLE.search(value)):
        raise ValueError(f"the control character {found[0]!r} in `enum` or `const` is not supported")
    if isinstance(value, list | dict):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            _require_writable(part)
