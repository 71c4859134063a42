from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.routing.training_tasks import (
    MAX_OF_FAMILY,
    NUM_PLAIN,
    NUM_SHOWN,
    TrainingTask,
    family_of,
    known_paths,
    other_domains,
    read_domains,
    shown_inputs,
)
from benchmarks.routing.wording_pools import INPUT, read_pools
from tests.benchmarks.bigbench import write_archive

TASKS = "bigbench/benchmark_tasks"
COINCIDENCES = {  # short texts that two hands wrote alike
    "{input}",
    "proofread: {input}",
    "lighthouse",
    "bookkeeper",
    "the printer is out of paper.",
    "i am living here since five years.",
    "// increments i by one\ni++;",
}


def examples(prefix: str, count: int = 60) -> list[dict[str, Any]]:
    return [{"input": f"{prefix} {number}"} for number in range(count)]


@pytest.fixture(scope="module")
def domains() -> dict[str, list[TrainingTask]]:
    return read_domains()


def test_tasks_come_from_unknown_families_and_no_family_has_many(tmp_path: Path) -> None:
    known = next(path for path in sorted(known_paths()) if path.count("/") > 3)  # a variant of a family
    sibling = f"{TASKS}/{family_of(known)}/another_variant/task.json"
    tasks: dict[str, list[dict[str, Any]]] = {known: examples("known"), sibling: examples("sibling")}
    tasks |= {f"{TASKS}/big/part_{n:02}/task.json": examples(f"big {n}") for n in range(MAX_OF_FAMILY + 3)}
    tasks[f"{TASKS}/alone/task.json"] = [*examples("alone"), *examples("alone"), {"input": " "}, {"input": ["a", "b"]}]
    tasks[f"{TASKS}/few/task.json"] = examples("few", 9)
    tasks["bigbench/other/task.json"] = examples("elsewhere")
    write_archive(tmp_path / "archive.tar.gz", tasks)
    found = other_domains(tmp_path / "archive.tar.gz")
    assert {name: len(own) for name, own in found.items()} == {"BIG-bench/alone": 1, "BIG-bench/big": MAX_OF_FAMILY}
    [alone] = found["BIG-bench/alone"]
    assert (len(set(alone.contents)), len(set(alone.direct)), alone.wordings) == (NUM_PLAIN, NUM_SHOWN, (INPUT,))
    assert all(text.startswith("alone ") for text in (*alone.contents, *alone.direct))
    assert other_domains(tmp_path / "archive.tar.gz") == found  # the same draw each time


def test_an_input_is_shown_with_its_options_in_a_random_order() -> None:
    options = {option: 0 for option in "abcdefgh"}
    given = [{"input": f" Which letter, {number}? ", "target_scores": options} for number in range(30)]
    texts = shown_inputs("letters", [*given, {"input": "No options."}, {"input": 3, "target_scores": options}])
    assert texts != sorted(texts)
    assert texts == shown_inputs("letters", [*given, {"input": "No options."}, {"input": 3, "target_scores": options}])
    assert "No options." in texts
    shown = [text.split("\nOPTIONS:\n- ") for text in texts if text != "No options."]
    assert sorted(first for first, _ in shown) == sorted(f"Which letter, {number}?" for number in range(30))
    orders = [rest.split("\n- ") for _, rest in shown]
    assert {tuple(sorted(order)) for order in orders} == {tuple("abcdefgh")}
    assert len(set(map(tuple, orders))) > 20


def test_no_task_of_a_pool_or_a_test_is_left_out() -> None:
    paths = known_paths()
    assert len(paths) == len(set(paths)) > 200  # the study's tasks and spares, and the starter pool's
    assert all(path.startswith(f"{TASKS}/") and path.endswith("/task.json") for path in paths)
    assert family_of(f"{TASKS}/a/b/task.json") == "a"


def test_every_written_task_has_several_wordings_and_contents(domains: dict[str, list[TrainingTask]]) -> None:
    tasks = [task for own in domains.values() for task in own]
    assert len(tasks) > 5000
    assert {name: len(own) for name, own in domains.items() if len(own) < 2} == {}
    for task in tasks:
        assert len(set(task.contents)) >= 4 and len(set(task.wordings)) >= 3, task.name
        assert all(text.count(INPUT) == 1 for text in (*task.wordings, *task.other)), task.name
    assert Counter(bool(task.topic) for task in tasks)[True] > 100


def test_texts_of_the_other_pools_are_not_trained_on(domains: dict[str, list[TrainingTask]]) -> None:
    parts = ("test", "test_words", "tune", "tune_words")
    pools = [pool for part in parts for pool in read_pools(part)]
    asked = {prompt.text.casefold() for pool in pools for prompt in pool.prompts}
    asked |= {text.casefold() for pool in pools for adapter in pool.adapters for text in adapter.inputs}
    asked |= {text.casefold() for pool in pools for adapter in pool.adapters for text in adapter.wordings}
    tasks = [task for own in domains.values() for task in own]
    given = {text.casefold() for task in tasks for text in (*task.contents, *task.wordings, *task.other, *task.direct)}
    assert asked & given == COINCIDENCES


def test_what_the_tasks_of_a_domain_share_stands_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        """
domains:
- name: shop
  contents: ["one", "two"]
  wordings: ["Say {input}"]
  tasks:
  - {name: all, description: "Says it.", other: {de: "Sag {input}"}, bare: ["please say it"]}
  - {name: own, contents: ["three"], wordings: ["{input}?"]}
crossed:
- name: grid
  topics: [{name: sea, description: "Ships.", contents: ["boat"]}, {name: sky, contents: ["kite"]}]
  formats: [{name: list, description: "As a list.", wordings: ["List: {input}"]}]
"""
    )
    assert read_domains(tmp_path) == {
        "a/shop": [
            TrainingTask("all", ("one", "two"), ("Say {input}",), ("Sag {input}",), ("please say it",), "Says it."),
            TrainingTask("own", ("three",), ("{input}?",)),
        ],
        "a/grid": [
            TrainingTask("sea__list", ("boat",), ("List: {input}",), (), (), "Ships. As a list.", "sea", "list"),
            TrainingTask("sky__list", ("kite",), ("List: {input}",), (), (), "As a list.", "sky", "list"),
        ],
    }
