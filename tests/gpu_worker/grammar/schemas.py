"""Random JSON schemas that the grammars support."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]


def random_schema(seed: int) -> Schema:
    """Return an object schema with up to three levels. The same seed gives the same schema."""
    return _object(random.Random(seed), depth=0)


def _object(chance: random.Random, depth: int) -> Schema:
    names = chance.sample(["name", "total", "é t", "x/y", 'a"b', "tags", "_id", "z~"], chance.randint(1, 3))
    required = [name for name in names if chance.random() < 0.7]
    return {
        "type": "object",
        "properties": {name: _any(chance, depth + 1) for name in names},
        "required": required,
        "additionalProperties": False,
    }


def _array(chance: random.Random, depth: int) -> Schema:
    least = chance.randint(0, 2)
    return {
        "type": "array",
        "items": _any(chance, depth + 1),
        "minItems": least,
        "maxItems": least + chance.randint(0, 2),
    }


def _tuple(chance: random.Random, depth: int) -> Schema:
    prefix = [_any(chance, depth + 1) for _ in range(chance.randint(1, 2))]
    return {"type": "array", "prefixItems": prefix, "items": False, "minItems": len(prefix)}


def _union(chance: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(chance, depth + 1), {"type": "null"}]}


def _string(chance: random.Random, depth: int) -> Schema:
    return chance.choice(
        [
            {"type": "string", "maxLength": 12},
            {"type": "string", "minLength": 2, "maxLength": 5},
            {"type": "string", "pattern": "^[a-f]{2,6}$"},
            {"type": "string", "format": "date"},
            {"type": "string", "format": "uuid"},
        ]
    )


def _number(chance: random.Random, depth: int) -> Schema:
    low = chance.randint(-1000, 1000)
    return chance.choice(
        [
            {"type": "integer", "minimum": low, "maximum": low + chance.randint(0, 500)},
            {"type": "number", "minimum": -1, "exclusiveMaximum": 7.5},
            {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": chance.choice([2, 5, 7])},
            {"type": "boolean"},
        ]
    )


def _fixed(chance: random.Random, depth: int) -> Schema:
    return chance.choice([{"enum": ["red", "grün", 3, None, {"a": [1, "b"]}]}, {"const": 'quote " and \\ slash'}])


def _any(chance: random.Random, depth: int) -> Schema:
    flat: list[Callable[[random.Random, int], Schema]] = [_string, _string, _number, _number, _fixed]
    nested = [_object, _array, _tuple, _union] if depth < 3 else []
    return chance.choice(flat + nested)(chance, depth)
