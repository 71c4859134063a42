"""The choice of the pool's adapters, and the scores of answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.paper.common.scoring import majority_scores, rouge_l, score
from benchmarks.paper.common.tasks import TaskList
from benchmarks.paper.pool.choose import (
    Verdict,
    choose_pool,
    empty_places,
    next_spares,
    pool_table,
    read_pool,
    read_rounds,
    read_verdicts,
    verdict,
    write_pool,
)
from benchmarks.training.bigbench_tasks import Item, TaskSpec

EM = TaskSpec("exact", "path", "maths", "{x}", "em")
ROUGE = replace(EM, name="rouge", metric="rouge_l")
SHOWN = replace(EM, name="shown", metric="acc", template="{x}\nOPTIONS:\n{o}")


@pytest.mark.parametrize(
    ("said", "wanted", "f1"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The cat, sat!", "the cat sat.", 1.0),
        ("a b c d", "a c e", 2 * 2 / 7),
        ("c a", "a c", 2 * 1 / 4),
        ("", "a", 0.0),
        ("!", "?", 1.0),
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(said: str, wanted: str, f1: float) -> None:
    assert rouge_l(said, wanted) == pytest.approx(f1)


def test_an_answer_is_scored_by_its_first_line_against_the_best_of_the_accepted() -> None:
    item = Item("x", ("yes sir", "no"))
    assert [score(EM, item, text) for text in (" No\nand more", "no more", "YES SIR")] == [1, 0, 1]
    assert score(ROUGE, item, "yes\nno") == pytest.approx(2 / 3)


def test_the_majority_comes_from_training_answers_and_chance_counts_if_options_are_shown() -> None:
    train = [Item("a", ("1",)), Item("b", ("1",)), Item("c", ("2",))]
    assert majority_scores(EM, train, [Item("d", ("2",)), Item("e", ("1",))]) == [0, 1]
    shown = [Item(f"{n}", (f"{n}",), num_options=2) for n in range(4)]
    assert majority_scores(SHOWN, train, shown[2:]) == [0.5, 0.5]


def test_an_adapter_is_kept_if_it_beats_every_reference_by_more_than_the_spread() -> None:
    assert verdict(EM, [1.0] * 15 + [0.0] * 5, [[0.0] * 20, [0.0] * 10 + [1.0] * 10]).is_kept is False
    kept = verdict(EM, [1.0] * 20, [[0.0] * 20, [1.0] * 10 + [0.0] * 10])
    assert kept.is_kept and kept.reference == 0.5 and 0 < kept.margin < 0.5
    assert not verdict(EM, [1.0, 0.0] * 10, [[0.0, 1.0] * 10]).is_kept


def test_a_task_that_is_not_kept_gives_its_place_to_a_kept_spare_of_its_cluster() -> None:
    tasks = [
        replace(EM, name=name, cluster=cluster) for name, cluster in [("a", "m"), ("b", "m"), ("c", "s"), ("d", "s")]
    ]
    spares = [replace(EM, name=name, cluster=cluster) for name, cluster in [("x", "m"), ("y", "m"), ("z", "s")]]
    margins = {"a": 0.2, "b": -0.1, "c": -0.1, "d": -0.1, "x": -0.2, "y": 0.3, "z": 0.1}
    verdicts = {name: Verdict(name, "", 0.5, 0.1, margin) for name, margin in margins.items()}
    listed = TaskList(tuple(tasks), tuple(spares))
    assert [spec.name for spec in empty_places(listed, verdicts)] == ["d"] and next_spares(listed, verdicts) == []
    untried = {name: verdicts[name] for name in "abcdx"}
    assert next_spares(listed, untried) == ["y", "z"]
    assert choose_pool(listed, verdicts) == {"a": "a", "y": "b", "z": "c"}
    found = pool_table(verdicts, choose_pool(listed, verdicts))
    assert "y |  | 50.0 | 10.0 | +30.0 | in place of b" in found and "x |  | 50.0 | 10.0 | -20.0 | not kept" in found


def test_a_place_whose_cluster_has_no_spare_left_goes_to_another_cluster() -> None:
    tasks = [replace(EM, name=name, cluster=cluster) for name, cluster in [("a", "m"), ("b", "s"), ("c", "w")]]
    spares = [replace(EM, name=name, cluster=cluster) for name, cluster in [("x", "s"), ("y", "m"), ("z", "m")]]
    listed = TaskList(tuple(tasks), tuple(spares))
    verdicts = {name: Verdict(name, name.upper(), 0.5, 0.1, 0.2 if name == "a" else -0.2) for name in "abc"}
    verdicts["a"] = replace(verdicts["a"], cluster="m")
    assert next_spares(listed, verdicts) == ["x"]
    assert next_spares(listed, verdicts, any_cluster=True) == ["y", "x"], "the cluster that is learnt, then one of each"
    for spare in "xyz":
        verdicts[spare] = Verdict(spare, "", 0.5, 0.1, 0.2)
    assert choose_pool(listed, verdicts) == {"a": "a", "x": "b", "y": "c"}


def test_the_pool_is_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "pool.json"
    write_pool(path, {"a": "a", "y": "b"}, [Verdict("a", "m", 1 / 3, 0.1, 0.2)], 2)
    assert read_rounds(path) == 2
    assert read_pool(path) == ["a", "y"] and '"own": 0.3333' in path.read_text()
    assert read_verdicts(path) == {"a": Verdict("a", "m", 0.3333, 0.1, 0.2)}
