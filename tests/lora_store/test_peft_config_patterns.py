from __future__ import annotations

import re

import pytest
from peft.utils.other import get_pattern_key

from lora_store.peft_config import PatternTable, pattern_problems


@pytest.mark.parametrize(
    "patterns",
    [
        ["q_proj"],
        ["layers.0.q_proj", "q_proj"],
        ["q_proj", "layers.0.q_proj"],
        ["^model.layers.0.q_proj"],
        ["^layers.0.q_proj"],
        [".*"],
        ["proj"],
        ["q|k", "k_proj"],
        [r"layers\.[01]\.k_proj", "q_pro."],
        ["model.layers.0.q_proj$"],
    ],
    ids=str,
)
@pytest.mark.parametrize("module", ["model.layers.0.q_proj", "model.layers.10.k_proj", "q_proj", "xq_proj", "k"])
def test_patterns_are_resolved_as_by_peft(patterns: list[str], module: str) -> None:
    values = {pattern: number for number, pattern in enumerate(patterns)}
    assert PatternTable(values).get([module], -1) == values.get(get_pattern_key(values.keys(), module), -1)


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("(a+)+", "too complex"),
        ("(a|a)(a|a)(a|a)x", "too complex"),
        (".*.*.*x", "too complex"),
        ("(?=a)", "too complex"),
        (r"(a)\1", "too complex"),
        ("(", "is not a valid regular expression"),
        ("a" * 257, "has 257 characters"),
    ],
)
def test_a_pattern_that_could_take_too_long_is_refused(pattern: str, problem: str) -> None:
    [found] = pattern_problems({pattern: 1}, max_patterns=10)
    assert problem in found


def test_a_table_of_many_patterns_is_refused() -> None:
    assert pattern_problems({f"m{n}": 1 for n in range(11)}, 10) == ["has 11 patterns, at most 10"]
    assert re.search("more than 64 times", pattern_problems({f".*m{n}.*": 1 for n in range(40)}, 100)[0])
