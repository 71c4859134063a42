"""Pairs of tasks that contradict each other, on the tiny study."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from benchmarks.paper.answering.runs import Bench
from benchmarks.paper.pool.choose import read_pool
from benchmarks.paper.stages import natural

PAIRS = (("animals", "cities"),)


def test_every_pair_is_in_the_pool_and_each_task_has_one_rival() -> None:
    rivals = natural.rivals_of()
    assert rivals.keys() <= set(read_pool()) and len(rivals) == 2 * len(natural.RIVALS) == 12
    assert all(rivals[rivals[task]] == task != rivals[task] for task in rivals)


def test_the_test_and_the_choice_part_are_asked(bench: Bench) -> None:
    study = natural.asked_study(bench.study, natural.rivals_of(PAIRS))
    assert list(study.specs) == ["animals", "cities"]
    for name in study.specs:
        whole = bench.study.parts[name]
        assert study.parts[name].test == whole.test + whole.choice
    assert study.parts["sums"] == bench.study.parts["sums"]


@pytest.mark.parametrize(("share", "weights"), [(1.0, [1.0]), (0.0, [1.0]), (0.75, [0.75, 0.25])])
def test_the_weights_are_shared_between_the_task_and_its_rival(
    bench: Bench, share: float, weights: list[float]
) -> None:
    questions = [q for q in bench.study.questions("test", 1) if q.task == "cities"]
    [plan] = natural.Against(natural.rivals_of(PAIRS), share).plans(bench.retriever, questions)
    assert [a.weight for a in plan.adapters] == weights
    assert plan.adapters[0].ref.name == ("animals" if share == 0 else "cities")


def test_the_stage_says_how_many_answers_are_the_rivals(bench: Bench, tmp_path: Path) -> None:
    assert natural.sentence(tmp_path) == "Pairs of related tasks were not measured yet."
    natural.measure(bench, tmp_path, 2, PAIRS)
    before = bench.asker.engine.counters.num_requests
    natural.measure(bench, tmp_path, 2, PAIRS)
    assert bench.asker.engine.counters.num_requests == before
    rows = pd.read_parquet(tmp_path / natural.ROWS)
    shares = rows.groupby("run")["as_rival"].mean()
    assert shares["rival"] == 1.0 and shares["own"] == 0.0
    assert set(rows["task"]) == {"animals", "cities"}
    assert "| own 0.75 |" in (tmp_path / "natural.md").read_text()
    assert f"At half, {100 * shares['own_0.5']:.1f} % of the answers" in natural.sentence(tmp_path)
