"""Invalid bodies of some megabytes, for every place where a route reads part of its body."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MEBIBYTE = 1 << 20
BODY_BYTES = 4 * MEBIBYTE
FEW = 16_000  # items of a list within the bound on values
_ROOM = 1024  # bytes around the value
_MARK = "\0here\0"


def _repeated(head: bytes, item: bytes, tail: bytes, size: int) -> bytes:
    return head + item * ((size - len(head) - len(tail)) // len(item)) + tail


def _few(item: bytes, size: int, brackets: bytes = b"[]") -> bytes:
    """Return FEW items, and white space up to the size."""
    text = brackets[:1] + b",".join([item] * FEW) + brackets[1:]
    return text[:-1] + b" " * (size - len(text)) + text[-1:]


def _keys(count: int, size: int) -> bytes:
    width = size // count - 5
    return b"{" + b",".join(b'"%0*d":0' % (width, number) for number in range(count)) + b"}"


# Replacements for a value, as JSON of about this many bytes.
VALUES: dict[str, Callable[[int], bytes]] = {
    "many numbers": lambda size: _repeated(b"[", b"1,", b"1]", size),
    "many texts": lambda size: _repeated(b"[", b'"",', b"1]", size),
    "many lists": lambda size: _repeated(b"[", b"[],", b"1]", size),
    "many objects": lambda size: _repeated(b"[", b"{},", b"1]", size),
    "many keys": lambda size: _keys(200_000, size),
    "few numbers": lambda size: _few(b"1", size),
    "few texts": lambda size: _few(b'"' + b"x" * (size // FEW - 3) + b'"', size),
    "few nested lists": lambda size: b"[" + b",".join([b"[1]"] * (FEW // 2)) + b" " * (size - 2 * FEW) + b"]",
    "few objects": lambda size: b"[" + b",".join([b'{"type":1}'] * (FEW // 2)) + b" " * (size - 11 * FEW // 2) + b"]",
    "few keys": lambda size: _keys(FEW, size),
    "deep lists": lambda size: b"[" * (size // 2) + b"]" * (size // 2),
    "deep objects": lambda size: _repeated(b"", b'{"a":', b"", size),
    "less deep": lambda size: b"[" * 15_000 + b" " * (size - 30_000) + b"]" * 15_000,
    "a text": lambda size: b'"' + b"x" * (size - 2) + b'"',
    "a text of marks": lambda size: _repeated(b'"', b",", b'"', size),
    "a text of escapes": lambda size: _repeated(b'"', b'\\"', b'"', size),
    "an open text of escapes": lambda size: _repeated(b'"', b'\\"', b"", size),
    "half surrogates": lambda size: _repeated(b'"', b"\\ud800", b'"', size),
    "a number": lambda size: b"9" * size,
    "a fraction": lambda size: b"0." + b"9" * (size - 2),
    "an exponent": lambda size: b"1e" + b"9" * (size - 2),
    "a number as text": lambda size: b'"' + b"9" * (size - 2) + b'"',
}
# Bodies that are not an object of the route.
WHOLE: dict[str, Callable[[int], bytes]] = {
    "white space": lambda size: b" " * size,
    "zeros": lambda size: b"\0" * size,
    "no UTF-8": lambda size: b"\xff" * size,
    "UTF-16": lambda size: ("[" + "1," * (size // 4)).encode("utf-16"),
    "quotes": lambda size: b'"' * size,
    "backslashes": lambda size: b'"' + b"\\" * (size - 1),
    "one key again and again": lambda size: _repeated(b"{", b'"model":"x",', b'"n":1}', size),
    **VALUES,
}


@dataclass(frozen=True)
class Place:
    """A field of a route's body: its path, and the body around it in two halves."""

    field: str
    before: bytes
    after: bytes

    def body(self, value: Callable[[int], bytes], size: int = BODY_BYTES) -> bytes:
        return self.before + value(size - _ROOM) + self.after


def places_of(schema: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[Place]:
    """Yield every field of a body with this schema, at any depth, with what its neighbours require."""
    for path, body in _bodies(schema, document, depth=0):
        before, _, after = json.dumps(body).partition(json.dumps(_MARK))
        yield Place(path, before.encode(), after.encode())


def resolved(schema: Mapping[str, Any], document: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        schema = document["components"]["schemas"][name]
    return schema


def _bodies(schema: Mapping[str, Any], document: Mapping[str, Any], depth: int) -> Iterator[tuple[str, Any]]:
    schema = resolved(schema, document)
    for choice in schema.get("anyOf", []):
        yield from _bodies(choice, document, depth)
    if schema.get("type") == "array" and depth < 8:
        for path, inner in [("", _MARK), *_bodies(schema.get("items", {}), document, depth + 1)]:
            yield f"[].{path}", [inner]
    if "properties" in schema and depth < 8:
        required = {name: _least(schema["properties"][name], document) for name in schema.get("required", [])}
        for name, inner_schema in schema["properties"].items():
            for path, inner in [("", _MARK), *_bodies(inner_schema, document, depth + 1)]:
                yield f"{name}.{path}".rstrip("."), required | {name: inner}
        yield "unknown", required | {"unknown": _MARK}


def _least(schema: Mapping[str, Any], document: Mapping[str, Any]) -> Any:
    """Return a small valid value."""
    schema = resolved(schema, document)
    if "anyOf" in schema:
        return _least(schema["anyOf"][0], document)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][-1]
    if schema["type"] == "array":
        return [_least(schema["items"], document)]
    if schema["type"] == "object":
        return {name: _least(schema["properties"][name], document) for name in schema.get("required", [])}
    return {"string": "x" * 64 if "pattern" in schema else "x" * schema.get("minLength", 1), "boolean": False}.get(
        schema["type"], 1
    )


_HEAD = b'--b\r\nContent-Disposition: form-data; name="%s"'
_FILE = _HEAD + b'; filename="%s"\r\n\r\n%s\r\n'
_FIELD = _HEAD + b"\r\n\r\n%s\r\n"
# Uploads with the boundary `b`.
FORMS: dict[str, Callable[[int], bytes]] = {
    "a field": lambda size: _FIELD % (b"name", b"x" * size) + b"--b--",
    "many fields": lambda size: (_FIELD % (b"tags", b"x")) * (size // 60) + b"--b--",
    "many unknown fields": lambda size: b"".join(_FIELD % (b"%d" % n, b"") for n in range(size // 60)) + b"--b--",
    "many files": lambda size: (_FILE % (b"files", b"x", b"")) * (size // 70) + b"--b--",
    "a file name": lambda size: _FILE % (b"files", b"x" * size, b"") + b"--b--",
    "a field's name": lambda size: _FIELD % (b"x" * size, b"") + b"--b--",
    "a part's header": lambda size: b"--b\r\nX-A: " + b"x" * size,
    "many headers of a part": lambda size: b"--b\r\n" + b"X-A: x\r\n" * (size // 8),
    "data before the parts": lambda size: b"\r\n" * (size // 2),
    "data after the parts": lambda size: _FIELD % (b"name", b"x") + b"--b--" + b"\r\n" * (size // 2),
    "half boundaries": lambda size: _FIELD[:-2] % (b"name", b"\r\n--a" * (size // 5)) + b"--b--",
    "line ends": lambda size: _HEAD % b"name" + b"\r\n\r\n" + b"\r" * size,
    "no boundary": lambda size: b"x" * size,
}
