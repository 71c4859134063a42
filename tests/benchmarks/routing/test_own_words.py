from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paper.retrieval.projected import read_everyday, read_fresh
from benchmarks.routing.conversations import read_cases
from benchmarks.routing.own_words import OTHERS, OwnWords, count_shares, count_task_shares, read_own_words
from benchmarks.starter_pool import HELD_OUT, NUM_TRAINED, POOL
from retriever_svc.ordinary_prompts import ordinary_prompts
from retriever_svc.shared_wording import num_wordings

RUN = 4  # words in a row that a prompt may not share with a sample in other words
HELD_OUT_RUN = 5  # an option of four words, such as "Can't be determined", is in both
PROMPTS = [*read_own_words("tune"), *read_own_words("test")]


def inputs_of(path: Path) -> list[str]:
    return [json.loads(line)["input"] for line in path.read_text(encoding="utf-8").splitlines()]


SAMPLES = {path.parent.name: inputs_of(path) for path in POOL.glob("*/lora_samples.jsonl")}
REWORDED = {task: texts[NUM_TRAINED:] for task, texts in SAMPLES.items()}


def runs_of(text: str, length: int = RUN) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return set(zip(*[words[start:] for start in range(length)], strict=False))


def test_both_parts_have_as_many_prompts_of_each_task_and_of_none() -> None:
    for part in ("tune", "test"):
        prompts = read_own_words(part)
        assert Counter(prompt.task for prompt in prompts) == dict.fromkeys(SAMPLES, 6) | {None: 42}
        assert Counter(prompt.kind for prompt in prompts if prompt.task is None) == {"everyday": 30, "neighbour": 12}
        assert all(bool(prompt.answers) == (prompt.task is not None) for prompt in prompts)
    assert len({prompt.input for prompt in PROMPTS}) == len(PROMPTS) == 228


def test_each_adapter_has_samples_in_many_wordings() -> None:
    assert {task: num_wordings(texts) >= 8 for task, texts in SAMPLES.items()} == dict.fromkeys(SAMPLES, True)
    assert len({text for texts in SAMPLES.values() for text in texts}) == sum(map(len, SAMPLES.values()))


def test_no_prompt_is_in_another_set_or_shares_four_words_in_a_row_with_a_reworded_sample() -> None:
    known = {*ordinary_prompts(), *read_everyday(), *read_fresh()}
    known |= {text for texts in SAMPLES.values() for text in texts}
    known |= {text for path in HELD_OUT.glob("*.jsonl") for text in inputs_of(path)}
    known |= {case.messages[-1]["content"] for name in ("conversations", "unseen_prompts") for case in read_cases(name)}
    assert not known & {prompt.input for prompt in PROMPTS}
    taken = {run: text for texts in REWORDED.values() for text in texts for run in runs_of(text)}
    assert [(prompt.input, taken[run]) for prompt in PROMPTS for run in runs_of(prompt.input) if run in taken] == []


def rows_of(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield row["input"], row["output"]


def test_reworded_samples_have_no_content_of_a_held_out_prompt() -> None:
    samples = {task: list(rows_of(POOL / task / "lora_samples.jsonl"))[NUM_TRAINED:] for task in SAMPLES}
    held_out = {task: list(rows_of(HELD_OUT / f"{task}.jsonl")) for task in SAMPLES}
    taken = {run for rows in held_out.values() for text, _ in rows for run in runs_of(text, HELD_OUT_RUN)}
    assert not [text for rows in samples.values() for text, _ in rows if runs_of(text, HELD_OUT_RUN) & taken]
    for task in ("past_tense", "reverse_letters", "date_format"):  # the answer says what was asked
        assert not {answer for _, answer in samples[task]} & {answer for _, answer in held_out[task]}, task


@pytest.mark.parametrize(
    ("said", "is_right"),
    [("!05!17!2001!", True), (" The dog, sleeps.\nmore", True), ("the dog sleeps not", False), ("", False)],
)
def test_the_first_line_of_an_answer_counts_by_its_letters_and_digits(said: str, is_right: bool) -> None:
    assert OwnWords("para", "a", "?", ("the dog sleeps", "!05!17!2001!")).is_answered_by(said) is is_right


def row(task: str | None, auto: str | None, *, kind: str = "para", right: bool = False) -> dict[str, Any]:
    return {"kind": kind, "task": task, "first": auto, "auto": auto, "auto_right": right, "named_right": True}


def test_prompts_of_no_adapter_count_only_where_the_base_model_should_answer() -> None:
    others = [row(None, name, kind=kind) for kind in OTHERS for name in (None, "a")]
    rows = [
        row("a", "a", right=True),
        row("a", "b"),
        row("b", None),
        row("b", "b"),
        *others,
        row(None, None, kind="everyday"),
    ]
    assert count_shares(rows) == {
        "first": 0.5,
        "right": 0.5,
        "wrong": 0.25,
        "answer_right": 0.25,
        "named_answer_right": 1.0,
        "everyday_away": 2 / 3,
        "neighbour_away": 0.5,
    }
    assert count_task_shares(rows, "a") == [0.5, 0.5, 1.0]
