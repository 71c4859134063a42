"""Per-module settings given as regular expressions, resolved as PEFT does, in bounded time."""

from __future__ import annotations

import re
from collections.abc import Mapping

_MAX_PATTERN_LEN = 256
_MAX_MODULE_LEN = 256
_MAX_REPEATS = 2
_MAX_GROUPS = 2
_MAX_TABLE_REPEATS = 64
_REPEAT = re.compile(r"[*+?{]")
_DANGEROUS = re.compile(r"\)[*+?{]|\(\?|\\[0-9]")  # a repeated group, look-around and flags, a back-reference


class PatternTable:
    """Patterns in their file's order; the first that matches a module's full path, or its end after a dot, decides."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self._values = dict(values)
        self._compiled = [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in self._values.items()]

    def get(self, module: str, default: float) -> float:
        if len(module) > _MAX_MODULE_LEN:  # bounds the time a pattern takes; no real module path is this long
            return default
        for pattern, value in self._compiled:
            if pattern.match(module):
                return value
        return self._values.get(module, default)


def pattern_problems(patterns: Mapping[str, object], max_patterns: int) -> list[str]:
    """What keeps these patterns from being compiled and matched in bounded time."""
    if len(patterns) > max_patterns:
        return [f"has {len(patterns)} patterns, at most {max_patterns}"]
    if sum(len(_REPEAT.findall(pattern)) for pattern in patterns) > _MAX_TABLE_REPEATS:
        return [f"repeats (* + ? {{) more than {_MAX_TABLE_REPEATS} times in all its patterns"]
    return [f"pattern {pattern[:100]!r} {problem}" for pattern in patterns if (problem := _problem(pattern))]


def _problem(pattern: str) -> str | None:
    if len(pattern) > _MAX_PATTERN_LEN:
        return f"has {len(pattern)} characters, at most {_MAX_PATTERN_LEN}"
    too_many = len(_REPEAT.findall(pattern)) > _MAX_REPEATS or pattern.count("(") > _MAX_GROUPS
    if too_many or _DANGEROUS.search(pattern):
        return f"is too complex: at most {_MAX_REPEATS} of * + ? {{ and {_MAX_GROUPS} plain groups, no group repeated"
    try:
        re.compile(pattern)
    except re.error as exc:
        return f"is not a regular expression: {exc}"
    return None
