"""Per-module settings keyed by regular expressions, resolved as PEFT resolves them, in bounded time."""

from __future__ import annotations

import re
from collections.abc import Mapping

_MAX_PATTERN_LEN = 256
_MAX_MODULE_LEN = 256
_MAX_REPEATS = 2
_MAX_GROUPS = 2
_MAX_TABLE_REPEATS = 64
_REPEAT = re.compile(r"[*+?{]")
_DANGEROUS = re.compile(r"\)[*+?{]|\(\?|\\[0-9]")  # a repeated group, look-around or flags, a back-reference


class PatternTable:
    """Values by pattern. The first pattern in file order that matches a module's path, or its end after a dot, wins."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self._values = dict(values)
        self._compiled = [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in self._values.items()]

    def get(self, module: str, default: float) -> float:
        """Return the value of the first pattern that matches, or `default`."""
        if len(module) > _MAX_MODULE_LEN:  # limits the time per pattern; no real module path is this long
            return default
        for pattern, value in self._compiled:
            if pattern.match(module):
                return value
        return self._values.get(module, default)


def pattern_problems(patterns: Mapping[str, object], max_patterns: int) -> list[str]:
    """Return the reasons why these patterns cannot be compiled or matched in bounded time."""
    if len(patterns) > max_patterns:
        return [f"has {len(patterns)} patterns, at most {max_patterns}"]
    if sum(len(_REPEAT.findall(pattern)) for pattern in patterns) > _MAX_TABLE_REPEATS:
        return [f"uses * + ? {{ more than {_MAX_TABLE_REPEATS} times in all its patterns together"]
    return [f"pattern {pattern[:100]!r} {problem}" for pattern in patterns if (problem := _problem(pattern))]


def _problem(pattern: str) -> str | None:
    if len(pattern) > _MAX_PATTERN_LEN:
        return f"has {len(pattern)} characters, at most {_MAX_PATTERN_LEN}"
    too_many = len(_REPEAT.findall(pattern)) > _MAX_REPEATS or pattern.count("(") > _MAX_GROUPS
    if too_many or _DANGEROUS.search(pattern):
        return f"is too complex: at most {_MAX_REPEATS} of * + ? {{, at most {_MAX_GROUPS} groups, no repeated group"
    try:
        re.compile(pattern)
    except re.error as exc:
        return f"is not a valid regular expression: {exc}"
    return None
