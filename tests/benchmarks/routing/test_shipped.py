from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.routing.shipped import (
    MAX_OF_FAMILY,
    NUM_PLAIN,
    NUM_SHOWN,
    family_of,
    fit,
    known_paths,
    other_tasks,
    shown_inputs,
    worded_tasks,
)
from benchmarks.routing.wording_pools import read_pools
from retriever_svc.encoder import unit_rows
from tests.benchmarks.bigbench import write_archive
from tests.retriever_svc.pool_fakes import FakeEncoder

TASKS = "bigbench/benchmark_tasks"


def examples(prefix: str, count: int = 60) -> list[dict[str, Any]]:
    return [{"input": f"{prefix} {number}"} for number in range(count)]


def test_tasks_come_from_unknown_families_and_no_family_has_many(tmp_path: Path) -> None:
    known = next(path for path in sorted(known_paths()) if path.count("/") > 3)  # a variant of a family
    sibling = f"{TASKS}/{family_of(known)}/another_variant/task.json"
    tasks: dict[str, list[dict[str, Any]]] = {known: examples("known"), sibling: examples("sibling")}
    tasks |= {f"{TASKS}/big/part_{n:02}/task.json": examples(f"big {n}") for n in range(MAX_OF_FAMILY + 3)}
    tasks[f"{TASKS}/alone/task.json"] = [*examples("alone"), *examples("alone"), {"input": " "}, {"input": ["a", "b"]}]
    tasks[f"{TASKS}/few/task.json"] = examples("few", 9)
    tasks["bigbench/other/task.json"] = examples("elsewhere")
    write_archive(tmp_path / "archive.tar.gz", tasks)
    chosen = other_tasks(tmp_path / "archive.tar.gz")
    names = ["alone", *[f"big/part_{n:02}" for n in range(MAX_OF_FAMILY)]]
    assert list(chosen) == [f"{name}, {way}" for name in names for way in ("plain", "shown")]
    assert [len(texts) for texts in chosen.values()] == [NUM_PLAIN, NUM_SHOWN] * len(names)
    assert len(set(chosen["alone, plain"])) == NUM_PLAIN  # no text twice
    assert all(text.startswith("alone ") for text in chosen["alone, plain"])
    assert other_tasks(tmp_path / "archive.tar.gz") == chosen  # the same draw each time


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


def test_the_projection_is_fitted_to_both_kinds_of_tasks_without_folds() -> None:
    """The mean and the covariance of each kind are computed slowly here; numpy's `cov` removes the mean of a task."""
    rng = np.random.default_rng(0)
    tasks = [[f"{name} {number}" for number in range(30)] for name in "abcdefgh"]
    rows = unit_rows(rng.standard_normal((8, 30, 6)).astype(np.float32) * [1, 1, 2, 2, 3, 3])
    table = {text: row for own, block in zip(tasks, rows, strict=True) for text, row in zip(own, block, strict=True)}
    fitted = fit(FakeEncoder(table, dim=6), tasks[:3], tasks[3:])  # type: ignore[arg-type]
    assert (fitted.encoder, fitted.matrix.shape, len(fitted.folds)) == ("fake-encoder", (6, 6), 0)
    means = [np.mean([block.mean(axis=0) for block in part], axis=0) for part in (rows[:3], rows[3:])]
    np.testing.assert_allclose(fitted.mean, 0.7 * means[0] + 0.3 * means[1], atol=1e-3)
    within = [np.mean([np.cov(block.T) for block in part], axis=0) for part in (rows[:3], rows[3:])]
    mixed = 0.7 * within[0] + 0.3 * within[1]
    inverse = np.linalg.inv(0.5 * mixed + 0.5 * np.trace(mixed) / 6 * np.eye(6))
    np.testing.assert_allclose(fitted.matrix @ fitted.matrix.T, inverse, rtol=1e-2, atol=1e-2 * inverse.max())


def test_worded_tasks_are_those_of_the_pools_that_no_result_is_of() -> None:
    tasks = worded_tasks()
    texts = {text for own in tasks for text in own}
    assert len(tasks) > 50 and all(len(own) > 5 for own in tasks)
    tested = {prompt.text for pool in read_pools("test") for prompt in pool.prompts}
    tested |= {text for pool in read_pools("test") for adapter in pool.adapters for text in adapter.samples("three")}
    assert not texts & tested
