"""A worker that answers as a model that calls tools, through the engine's own grammars and parser."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from gpu_worker.front.grammar.library import compile_matcher, make_vocabulary
from gpu_worker.front.grammar.tool_grammar import tool_grammar
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.front.request.request import Delta, Job
from gpu_worker.front.request.tool_parser import ToolCallParser
from gpu_worker.front.request.tools import HERMES, Tools
from tests.clients.scripted_worker import ScriptedWorker

_END = 256
_PIECE_CHARS = 7


class FollowingWorker(ScriptedWorker):
    """Calls the named or the first function, with what the question says, where the last message is the user's.

    Other jobs are answered as by the scripted worker.
    """

    async def stream(self, job: Job) -> AsyncIterator[Delta]:
        if job.tools is None or not isinstance(job.prompt, tuple) or job.prompt[-1].role != "user":
            async for delta in super().stream(job):
                yield delta
            return
        text, grammar = _call(job.tools, job.prompt[-1].content), tool_grammar(job.tools, HERMES, job.sampling.grammar)
        if grammar is not None:
            _require_allowed(grammar, text)
        names = {function.name for function in job.tools.functions}
        parser = ToolCallParser(HERMES, names, is_constrained=grammar is not None)
        places = [*range(0, len(text), _PIECE_CHARS), len(text)]
        for number, (begin, end) in enumerate(itertools.pairwise(places), 1):
            content, calls, reason = parser.read(text[begin:end], "stop" if end == len(text) else None)
            yield Delta(content, 5, number, reason, tool_calls=calls)


def _call(tools: Tools, question: str) -> str:
    function = next(each for each in tools.functions if tools.only in (None, each.name))
    schema = json.loads(function.parameters)
    call = {"name": function.name, "arguments": _value(schema, question, schema)}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def _value(schema: Mapping[str, Any], question: str, root: Mapping[str, Any]) -> Any:
    """Return a value for the schema: numbers and quoted words come from the question, in their order."""
    numbers, words = iter(re.findall(r"\d+", question)), iter(re.findall(r"'([^']+)'", question))
    return _filled(schema, numbers, words, root)


def _filled(schema: Mapping[str, Any], numbers: Iterator[str], words: Iterator[str], root: Mapping[str, Any]) -> Any:
    if "$ref" in schema:
        return _filled(root["$defs"][schema["$ref"].rpartition("/")[2]], numbers, words, root)
    if "anyOf" in schema:
        return _filled(schema["anyOf"][0], numbers, words, root)
    if "enum" in schema:
        return schema["enum"][0]
    if schema.get("type") == "object":
        parts = schema.get("properties", {}).items()
        return {name: _filled(part, numbers, words, root) for name, part in parts} or {}
    if schema.get("type") in ("integer", "number"):
        return int(next(numbers, "1"))
    return next(words, "some text")


def _require_allowed(grammar: Grammar, text: str) -> None:
    vocabulary = make_vocabulary(lambda n: bytes([n]) if n < _END else b"", _END + 1, [_END])
    matcher = compile_matcher(grammar.kind, grammar.text, vocabulary)
    is_allowed = matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()
    assert is_allowed, f"the grammar {grammar.text} forbids {text}"
