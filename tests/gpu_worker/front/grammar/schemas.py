"""Random JSON schemas that the grammars support, and those of JSON Schema's own test suite."""

from __future__ import annotations

import json
import os
import random
import tarfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import jsonschema_rs
import pytest

NEWEST = "draft2020-12"
DRAFTS = {
    NEWEST: jsonschema_rs.Draft202012Validator,
    "draft2019-09": jsonschema_rs.Draft201909Validator,
    "draft7": jsonschema_rs.Draft7Validator,
    "draft6": jsonschema_rs.Draft6Validator,
    "draft4": jsonschema_rs.Draft4Validator,
}

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


def suite_schemas() -> list[tuple[str, Schema]]:
    """Return the distinct schemas of JSON Schema's own test suite, each with its draft.

    Skip the test where the suite is not installed: the source distribution of `jsonschema` contains it.
    """
    found = sorted((Path(__file__).parents[4] / ".venv" / "json-schema").glob("jsonschema-*.tar.gz"))
    if not found:
        (pytest.fail if os.environ.get("CI_REQUIRES_CLIENTS") else pytest.skip)(
            "no JSON Schema suite: make test-clients"
        )
    schemas: dict[str, tuple[str, Schema]] = {}
    with tarfile.open(found[-1]) as suite:
        for member in suite.getmembers():
            _, is_test, path = member.name.partition("/json/tests/")
            draft = path.partition("/")[0]
            if is_test and draft in DRAFTS and path.endswith(".json"):
                content = suite.extractfile(member)
                assert content is not None
                cases = [case["schema"] for case in json.load(content)]
                schemas |= {json.dumps(each): (draft, each) for each in cases if isinstance(each, dict)}
    return list(schemas.values())


def is_valid(draft: str, schema: Schema, text: str) -> bool:
    """Return whether the text is valid for the schema, by an independent validator that also checks formats.

    The draft is the one that the schema declares, or else the newest in which it is a schema.
    """
    newest = jsonschema.Draft202012Validator
    is_newest = "$schema" not in schema and newest(newest.META_SCHEMA).is_valid(schema)
    validator = DRAFTS[NEWEST if is_newest else draft](schema, validate_formats=True)
    return bool(validator.is_valid(json.loads(text, parse_float=Decimal)))
