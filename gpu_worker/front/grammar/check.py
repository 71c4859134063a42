"""Check one grammar in a process of its own: `python -m gpu_worker.front.grammar.check`.

The grammar comes from a client. Some need minutes or gigabytes to compile, and the library has no call to stop that. So
a process with limits compiles it first, against a vocabulary of single bytes, and follows it for a few bytes.

It reads {"kind", "text"} from standard input and writes {"error", "pointer"}; `error` is null for a good grammar.
"""

from __future__ import annotations

import json
import math
import random
import resource
import sys
import time
from typing import TYPE_CHECKING

import numpy as np

from gpu_worker.errors import GrammarInvalid
from gpu_worker.front.grammar.library import compile_matcher, make_vocabulary
from gpu_worker.front.grammar.schema import subschemas
from gpu_worker.front.request.grammar import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CPU_S = 2
MAX_BYTES = 1 << 31  # address space of the checking process
_NUM_STEPS = 48
_MAX_SUBSCHEMAS = 500
_END = 256


def check(grammar: Grammar) -> None:
    """Return if the grammar compiles and a text can begin with it. Raises: GrammarInvalid."""
    vocabulary = make_vocabulary(lambda token_id: bytes([token_id]) if token_id < _END else b"", _END + 1, [_END])
    error = _find_error(grammar, vocabulary)
    if error is not None:
        if grammar.kind == "tool_calls":
            _check_schemas(grammar, vocabulary)
        pointer = _find_place(error, grammar.text, vocabulary) if grammar.kind == "json_schema" else ""
        raise GrammarInvalid(error, pointer)


def _check_schemas(grammar: Grammar, vocabulary: LLTokenizer) -> None:
    """Check the schemas of a grammar of calls one by one. Raises: GrammarInvalid for the first wrong one."""
    for pointer, schema in json.loads(grammar.text)["schemas"].items():
        text = json.dumps(schema)
        error = _find_error(Grammar("json_schema", text), vocabulary)
        if error is not None:
            raise GrammarInvalid(error, pointer + _find_place(error, text, vocabulary))


def _find_error(grammar: Grammar, vocabulary: LLTokenizer) -> str | None:
    try:
        matcher = compile_matcher(grammar, vocabulary)
    except ValueError as exc:
        return str(exc)
    return _message(matcher) if matcher.is_error() else _error_while_following(matcher)


def _error_while_following(matcher: LLMatcher) -> str | None:
    """Choose a few bytes that the grammar allows, and return an error of that."""
    chance = random.Random(0)
    for _ in range(_NUM_STEPS):
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"))
        if matcher.is_error():
            return "no text matches it, or it is too complex"
        matcher.consume_token(int(chance.choice(allowed.tolist())))
        if matcher.is_stopped():
            break
    return _message(matcher) if matcher.is_error() else None


def _message(matcher: LLMatcher) -> str:
    """Return the library's message without its marks."""
    lines = [line for line in matcher.get_error().splitlines() if line.strip() and line != "<non-verbose/>"]
    return " ".join(" ".join(lines).split())[:500]


def _find_place(error: str, text: str, vocabulary: LLTokenizer) -> str:
    """Return the JSON pointer of the innermost schema that has this error on its own, or "" for the whole schema."""
    try:
        root = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(root, dict):
        return ""
    shared = {name: root[name] for name in ("$defs", "definitions") if name in root}
    for number, (pointer, schema) in enumerate(subschemas(root)):
        if number == _MAX_SUBSCHEMAS:
            break
        alone = Grammar("json_schema", json.dumps(shared | schema if pointer else schema))
        if _find_error(alone, vocabulary) == error:
            return pointer
    return ""


def main() -> None:
    """Check the grammar of standard input within the limits."""
    limit_s = math.ceil(time.process_time()) + MAX_CPU_S  # on slow machines imports alone take a second
    resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    error, pointer = None, ""
    try:
        check(Grammar(**json.load(sys.stdin)))
    except GrammarInvalid as exc:
        error, pointer = exc.message, exc.pointer
    json.dump({"error": error, "pointer": pointer}, sys.stdout)


if __name__ == "__main__":
    main()
