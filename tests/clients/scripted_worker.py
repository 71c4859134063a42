"""A worker whose answers follow the format that the request asks for, so that clients can parse them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import jsonschema

from gpu_worker.front.request.grammar import ANY_OBJECT, Grammar
from gpu_worker.front.request.request import Delta, Job
from tests.deployments.fake_worker import FakeWorker

JOKE = {"setup": "Why?", "punchline": "Because."}  # what standard tests ask for in words
_PROMPT_TOKENS = 5
_PIECES = 4


class ScriptedWorker(FakeWorker):
    """Says "Hello", or what the grammar of the job allows."""

    async def stream(self, job: Job) -> AsyncIterator[Delta]:
        if job.sampling.grammar is None:
            async for delta in super().stream(job):
                yield delta
            return
        text = text_of(job.sampling.grammar)
        size = max(1, len(text) // _PIECES)
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        for count, piece in enumerate(pieces, 1):
            yield Delta(piece, _PROMPT_TOKENS, count, "stop" if count == len(pieces) else None)


def text_of(grammar: Grammar) -> str:
    """Return a text that the grammar allows. Raises: ValueError for a kind that no client of these tests asks for."""
    if grammar.kind == "choice":
        return str(json.loads(grammar.text)[0])
    if grammar.kind != "json_schema":
        raise ValueError(f"no client asks for {grammar.kind}")
    schema = json.loads(grammar.text)
    value = JOKE if grammar.text == ANY_OBJECT else instance_of(schema, schema)
    jsonschema.validate(value, schema)
    return json.dumps(value)


def instance_of(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """Return the plainest value that is valid under a schema. `root`: the schema that holds its definitions."""
    if "$ref" in schema:
        found: Any = root
        for name in schema["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        return instance_of(found, root)
    for name in ("const", "default"):
        if name in schema:
            return schema[name]
    if "enum" in schema:
        return schema["enum"][0]
    for name in ("anyOf", "oneOf", "allOf"):
        if name in schema:
            return instance_of(schema[name][0], root)
    kind = schema.get("type", "object")
    if kind == "object":
        return {name: instance_of(own, root) for name, own in schema.get("properties", {}).items()}
    if kind == "array":
        return [instance_of(schema["items"], root)] * max(1, schema.get("minItems", 1))
    return {"string": "text", "integer": 1, "number": 0.5, "boolean": True, "null": None}[kind]
