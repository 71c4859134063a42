"""The instruction that all prompts of a task have."""

from __future__ import annotations

import json

import pytest

from benchmarks.contracts import Instruction, find_instruction


@pytest.mark.parametrize(
    ("texts", "head", "tail", "stripped"),
    [
        (["Negate: the dog", "Negate: the man ran"], "Negate: the ", "", ["dog", "man ran"]),
        (["Input: a\nOutput:", "Input: bb\nOutput:"], "Input: ", "\nOutput:", ["a", "bb"]),
        (["Good?\nIs it so?", "Wood?\nIs it so?"], "", "\nIs it so?", ["Good?", "Wood?"]),
        (["one thing", "another"], "", "", ["one thing", "another"]),
    ],
)
def test_an_instruction_is_whole_words_around_every_text(
    texts: list[str], head: str, tail: str, stripped: list[str]
) -> None:
    found = find_instruction(texts)
    assert found == Instruction(head, tail)
    assert [found.strip(text) for text in texts] == stripped
    assert (
        [json.loads(found.contract)["instruction"].replace("{input}", text) for text in stripped] == texts
        if (head or tail)
        else found.contract == ""
    )
