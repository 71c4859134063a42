"""Check one grammar in a process of its own: `python -m gpu_worker.front.grammar.check`.

The grammar comes from a client. Some need minutes or gigabytes to compile, and the library has no call to stop that. So
a process with limits compiles it first, against a vocabulary of single bytes, and follows it for a few bytes.

It reads {"kind", "text"} from standard input and writes {"error", "pointer"}; `error` is null for a good grammar. Every
new grammar waits for its process, so this module imports only what it needs: the errors of the worker would bring the
whole store and numpy, three quarters of the time of a check.
"""

from __future__ import annotations

import json
import math
import random
import resource
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from gpu_worker.front.grammar.library import compile_matcher, make_vocabulary
from gpu_worker.front.grammar.schema import subschemas

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CPU_S = 2
MAX_BYTES = 1 << 31  # address space of the checking process
_NUM_STEPS = 48
_END = 256


class Refusal(NamedTuple):
    """Why a grammar is refused, and the JSON pointer of the schema's invalid part."""

    error: str
    pointer: str = ""


def check(kind: str, text: str) -> Refusal | None:
    """Return None if the grammar compiles and a text can begin with it."""
    began = time.process_time()
    vocabulary = make_vocabulary(lambda token_id: bytes([token_id]) if token_id < _END else b"", _END + 1, [_END])
    error = _find_error(kind, text, vocabulary)
    if error is None:
        return None
    wrong_schema = _check_schemas(text, vocabulary, began) if kind == "tool_calls" else None
    return wrong_schema or Refusal(error, _find_place(error, text, vocabulary, began) if kind == "json_schema" else "")


def _check_schemas(text: str, vocabulary: LLTokenizer, began: float) -> Refusal | None:
    """Check the schemas of a grammar of calls one by one. Return the refusal of the first wrong one."""
    for pointer, schema in json.loads(text)["schemas"].items():
        alone = json.dumps(schema)
        error = _find_error("json_schema", alone, vocabulary)
        if error is not None:
            return Refusal(error, pointer + _find_place(error, alone, vocabulary, began))
    return None


def _find_error(kind: str, text: str, vocabulary: LLTokenizer) -> str | None:
    try:
        matcher = compile_matcher(kind, text, vocabulary)
    except ValueError as exc:
        return str(exc)
    return _message(matcher) if matcher.is_error() else _error_while_following(matcher)


def _error_while_following(matcher: LLMatcher) -> str | None:
    """Choose a few bytes that the grammar allows, and return an error of that."""
    chance = random.Random(0)
    for _ in range(_NUM_STEPS):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error():
            return "no text matches it, or it is too complex"
        matcher.consume_token(chance.choice([token_id for token_id in range(_END + 1) if mask >> token_id & 1]))
        if matcher.is_stopped():
            break
    return _message(matcher) if matcher.is_error() else None


def _message(matcher: LLMatcher) -> str:
    """Return the library's message without its marks."""
    lines = [line for line in matcher.get_error().splitlines() if line.strip() and line != "<non-verbose/>"]
    return " ".join(" ".join(lines).split())[:500]


def _find_place(error: str, text: str, vocabulary: LLTokenizer, began: float) -> str:
    """Return the JSON pointer of the innermost schema that has this error on its own.

    It is "" for the whole schema, and if the search takes too long. `began`: the process's time at the check's start.
    """
    spent = time.process_time() - began
    end = began + MAX_CPU_S - spent  # the last part may take as long as all before the search
    try:
        root = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(root, dict):
        return ""
    shared = {name: root[name] for name in ("$defs", "definitions") if name in root}
    for pointer, schema in subschemas(root):
        if time.process_time() > end:
            break
        alone = json.dumps(shared | schema if pointer else schema)
        if _find_error("json_schema", alone, vocabulary) == error:
            return pointer
    return ""


def main() -> None:
    """Check the grammar of standard input within the limits."""
    limit_s = math.ceil(time.process_time()) + MAX_CPU_S  # on slow machines imports alone take a second
    resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    error, pointer = check(**json.load(sys.stdin)) or (None, "")
    json.dump({"error": error, "pointer": pointer}, sys.stdout)


if __name__ == "__main__":
    main()
