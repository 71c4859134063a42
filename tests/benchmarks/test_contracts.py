"""The instruction that all prompts of a task have, and what its contract changes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from benchmarks.contracts import ARMS, CONTRACT, STRIPPED, WHOLE, Instruction, Task, ask, find_instruction, show
from benchmarks.training.bigbench_tasks import Item, is_right
from deployments.batch.offline import Generated, LoraRetriever


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


class Offline:
    """Answers with the prompt. `auto` is led by `one`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def generate(self, prompts: Sequence[str], lora: Sequence[dict[str, Any]], **fields: Any) -> list[Generated]:
        self.asked = list(zip(prompts, lora, strict=True))
        return [Generated(text, adapters=own.get("adapters", [{"name": "one"}])) for text, own in self.asked]


def make_task(*texts: str, instruction: Instruction) -> Task:
    """Return a task whose adapter is right where its answer is the whole prompt."""
    return Task(Path(), [Item(text, (text,)) for text in texts], instruction, is_right)


def test_an_arm_decides_on_the_instruction_the_contract_and_the_adapter() -> None:
    tasks = {
        "one": make_task("Say a", "Say b", instruction=Instruction("Say ", "")),
        "two": make_task("c", "d", instruction=Instruction("", "")),
    }
    offline = Offline()
    found = ask(cast(LoraRetriever, offline), tasks, 2)
    named = {name: {"adapters": [{"name": name}]} for name in tasks}
    wanted = [(text, named["one"] | {"contract": False}) for text in ("Say a", "Say b", "a", "b")]
    wanted += [(text, named["one"] | {"contract": True}) for text in "ab"]
    wanted += [(text, named["two"] | {"contract": False}) for text in "cd"]
    wanted += [(text, {"contract": False}) for text in ("Say a", "Say b", "a", "b", "c", "d")]
    wanted += [(text, {"contract": True}) for text in "abcd"]
    assert sorted(map(repr, offline.asked)) == sorted(map(repr, wanted)), "each is asked once"
    assert found[WHOLE, "auto"].tolist() == [[[1, 1], [1, 1]], [[1, 1], [0, 0]]]
    assert found[STRIPPED, "the adapter"].tolist() == [[[0, 0], [1, 1]], [[1, 1], [1, 1]]]


def test_differences_are_of_the_tasks_with_an_instruction_and_of_all() -> None:
    found = {arm: np.zeros((2, 4, 3)) for arm in ARMS}
    found[CONTRACT, "auto"][0, 0] = 1
    text, figures = show(found, [True, False, False, False])
    assert figures[f"{CONTRACT}, auto, of tasks with an instruction"].mean == 1.0
    assert figures[f"{CONTRACT} − {STRIPPED}, auto, of all tasks"].mean == 0.25
    assert figures[f"{CONTRACT} − {STRIPPED}, the adapter, of all tasks"].mean == 0.0
    assert "25.0 (25.0 to 25.0)" in text
