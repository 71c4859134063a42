"""The study's list, rendering and parts."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path

import pytest

from benchmarks.paper.common.tasks import (
    NUM_CHOICE,
    NUM_SAMPLES,
    NUM_TEST,
    Parts,
    load_parts,
    make_parts,
    read_task_list,
)
from benchmarks.paper.common.workspace import Workspace
from benchmarks.training.bigbench_tasks import TaskSpec
from lora_store import is_valid_name
from tests.benchmarks.bigbench import word_tokenizer, write_archive

SUMS = TaskSpec("sums", "bigbench/benchmark_tasks/sums/task.json", "maths", "{x}", "em")
CHOICES = replace(SUMS, name="choices", template="{x}\nOPTIONS:\n{o}", metric="acc")


def sums(count: int) -> list[dict[str, object]]:
    return [{"input": f"{n} plus 1?", "target": str(n + 1)} for n in range(count)]


def inputs(parts: Parts) -> list[set[str]]:
    return [{item.input.partition("\n")[0] for item in getattr(parts, field.name)} for field in fields(Parts)]


def test_the_list_holds_48_tasks_of_12_clusters_and_spares_enough_to_grow_to_190() -> None:
    listed = read_task_list()
    assert len(listed.tasks) == 48 and len({spec.cluster for spec in listed.tasks}) == 12
    assert len(listed.tasks) + len(listed.spares) >= 190
    assert len(listed.by_name) == len({spec.path for spec in listed.by_name.values()}) == 48 + len(listed.spares)
    assert all(is_valid_name(name) for name in listed.by_name)
    assert {spec.cluster for spec in listed.spares} <= {spec.cluster for spec in listed.tasks}
    assert {spec.metric for spec in listed.by_name.values()} == {"em", "acc", "rouge_l"}


@pytest.mark.parametrize("count", [300, 1500])
def test_no_input_is_in_two_parts_whatever_its_case_blanks_or_options(count: int) -> None:
    examples = [
        {"input": text, "target_scores": {f"yes {n}": 1, f"no {other}": 0}}
        for n in range(count)
        for other, text in enumerate([f"Is {n} odd", f"is  {n} ODD "])
    ]
    parts = make_parts(CHOICES, examples, word_tokenizer)
    keys = [{" ".join(text.split()).casefold() for text in texts} for texts in inputs(parts)]
    assert all(not one & other for one, other in combinations(keys, 2))
    assert sum(map(len, keys)) == len(set().union(*keys)) == min(count, 50 + 50 + 20 + 800)
    assert all(item.num_options == 2 and item.answers[0].startswith("yes") for item in parts.train)


def test_parts_are_the_same_every_time_and_another_name_has_others() -> None:
    parts = make_parts(SUMS, sums(400), word_tokenizer)
    assert parts == make_parts(SUMS, sums(400), word_tokenizer)
    assert parts.test != make_parts(replace(SUMS, name="more_sums"), sums(400), word_tokenizer).test
    assert [len(part) for part in (parts.test, parts.choice, parts.samples)] == [NUM_TEST, NUM_CHOICE, NUM_SAMPLES]
    assert len(parts.train) == 400 - 120


def test_small_tasks_keep_two_thirds_for_training() -> None:
    parts = make_parts(SUMS, sums(160), word_tokenizer)
    assert (len(parts.test), len(parts.choice), len(parts.samples), len(parts.train)) == (50, 30, 20, 60)


def test_answers_above_the_tasks_limit_are_dropped() -> None:
    examples = [{"input": f"say {n}", "target": "a " * (20 if n % 2 else 3)} for n in range(300)]
    assert sum(map(len, inputs(make_parts(SUMS, examples, word_tokenizer)))) == 150
    assert sum(map(len, inputs(make_parts(replace(SUMS, max_answer_tokens=32), examples, word_tokenizer)))) == 300


def test_parts_are_read_from_the_archive_once(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    write_archive(workspace.archive, {SUMS.path: sums(200)})
    made = load_parts([SUMS], workspace, word_tokenizer)
    workspace.archive.unlink()
    assert (
        load_parts([SUMS], workspace, word_tokenizer) == made == {"sums": make_parts(SUMS, sums(200), word_tokenizer)}
    )
