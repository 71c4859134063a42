"""Plain text for what pydantic finds wrong in settings, keys files and request bodies."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from deployments.json_types import JsonMapping

_MAX_SHOWN_CHARS = 60
_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?([KkMmGgTt])((?:[Ii]?[Bb])?)")
# By pydantic's error type: what is allowed, with names from the error's context.
_ALLOWED: dict[str, str] = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "literal_error": "must be {expected}",
    "string_pattern_mismatch": "must match {pattern}",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must have at least {min_length} characters",
    "too_long": "must have at most {max_length} items",
    "too_short": "must have at least {min_length} items",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "string_unicode": "must be valid Unicode: it has half of a surrogate pair",
    "path_type": "must be a path",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be an object with named fields",
    "model_type": "must be an object with named fields",
    "model_attributes_type": "must be an object with named fields",
    "dataclass_type": "must be an object with named fields",
}


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'name'?` for the known name nearest to `given`, or "" where none is near."""
    near = difflib.get_close_matches(given, list(known), n=1)
    if not near:
        near = sorted((name for name in known if len(given) > 3 and name.startswith(given)), key=len)[:1]
    return f"; did you mean {near[0]!r}?" if near else ""


def describe_problem(problem: JsonMapping, known: Iterable[str] = (), *, shows_value: bool = True) -> str:
    """Describe one item of `ValidationError.errors()` without its path.

    `known`: the names that are allowed where the problem is an unknown name. `shows_value`: quote what was given;
    switch this off where it may be a secret.
    """
    kind, context = problem["type"], problem.get("ctx", {})
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return "unknown" + did_you_mean(str(problem["loc"][-1]), known)
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(context.get("error", problem["msg"]))
    if kind in ("too_short", "too_long") and isinstance(problem.get("input"), str):
        kind = f"string_{kind}"  # of a secret
    if kind not in _ALLOWED:
        message: str = problem["msg"]
        return message
    is_size = kind == "int_parsing" and any(str(part).endswith("_bytes") for part in problem["loc"][-1:])
    if is_size and (size := _SIZE.fullmatch(str(problem["input"]).strip())):
        return f"must be a number of bytes: {size[0]} is {_num_bytes(size)}"
    bounds = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}
    return _ALLOWED[kind].format(**bounds) + (_got(problem.get("input")) if shows_value else "")


def _num_bytes(size: re.Match[str]) -> int:
    """Return the bytes of a size such as 8GB, 8 GiB or 8g. A letter alone means the binary unit."""
    number, letter, unit = size.groups()
    base = 1000 if unit.lower() == "b" else 1024
    num_bytes: float = float(number) * base ** ("kmgt".index(letter.lower()) + 1)
    return round(num_bytes)


def field_names(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Return the names that `model` allows next to the last part of `path`; none where they are free."""
    current: Any = model
    for part in path[:-1]:
        fields = getattr(current, "model_fields", {})
        if part not in fields:
            return []
        current = _plain_class(fields[part].annotation)
    return list(getattr(current, "model_fields", None) or getattr(current, "__dataclass_fields__", {}))


def _plain_class(annotation: Any) -> Any:
    """Return the one class in `X`, `X | None` or `Annotated[X, …]`."""
    if get_origin(annotation) is None:
        return annotation
    return next((_plain_class(part) for part in get_args(annotation) if part is not type(None)), None)


def _got(value: object) -> str:
    if isinstance(value, list | tuple | dict):
        return f", got {'an object' if isinstance(value, dict) else 'a list'}"
    shown = "null" if value is None else repr(value)
    return f", got {shown if len(shown) <= _MAX_SHOWN_CHARS else shown[:_MAX_SHOWN_CHARS] + '…'}"
