"""The companion experiment on the tiny study."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from benchmarks.paper.answering.runs import Bench
from benchmarks.paper.stages import companions
from benchmarks.paper.stages.companions import KINDS, RATIOS, Accompanied, Alone, companions_of, overlap, sharing_tasks


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_own_adapter_has_its_ratio_to_each_companion(bench: Bench, ratio: int) -> None:
    questions = bench.study.questions("test", 2)
    others = {"animals": ["sums", "cities"], "cities": ["sums", "animals"], "sums": ["cities", "animals"]}
    for named in (others, None):
        for question, plan in zip(questions, Accompanied(ratio, named).plans(bench.retriever, questions), strict=True):
            first, *rest = plan.adapters
            assert first.ref.name == question.task and len(rest) == 2
            assert all(first.weight == pytest.approx(ratio * a.weight) for a in rest)
            assert sum(a.weight for a in plan.adapters) == pytest.approx(1.0)
            assert named is None or [a.ref.name for a in rest] == others[question.task]


def test_a_third_of_an_adapter_stays_a_third(bench: Bench) -> None:
    [plan] = Alone(1 / 3).plans(bench.retriever, bench.study.questions("test", 1)[:1])
    assert [a.weight for a in plan.adapters] == [pytest.approx(1 / 3)]


def test_companions_never_include_the_own_adapter(bench: Bench) -> None:
    found = companions_of(bench.study, bench.retriever)
    assert found.keys() == set(KINDS) - {"nearest"}
    for by_task in found.values():
        assert by_task.keys() == bench.study.specs.keys()
        assert all(task not in names and len(set(names)) == 2 for task, names in by_task.items())


def test_tasks_share_labels_only_with_companions_of_the_same_answers(bench: Bench) -> None:
    """The tiny tasks have one answer each, and all are different."""
    found = companions_of(bench.study, bench.retriever)
    assert sharing_tasks(bench.study, found["same_labels"]) == []
    assert sharing_tasks(bench.study, {"animals": ["animals", "animals"]}) == ["animals"]
    assert overlap({"a", "b"}, {"b", "c"}) == pytest.approx(1 / 3)


def test_the_stage_asks_nothing_twice(bench: Bench, tmp_path: Path) -> None:
    assert companions.sentence(tmp_path) == "It was not measured yet."
    companions.measure(bench, tmp_path, 1)
    before = bench.asker.engine.counters.num_requests
    companions.measure(bench, tmp_path, 1)
    assert bench.asker.engine.counters.num_requests == before
    rows = pd.read_parquet(tmp_path / companions.ROWS)
    assert set(rows["run"]) == {"own", "own_third"} | {f"{kind}_{ratio}" for kind in KINDS for ratio in RATIOS}
    assert "| same labels |" in (tmp_path / "companions.md").read_text()
    assert companions.sentence(tmp_path).count("(") == 5
    companions.measure(bench, tmp_path, 1, ratios=(1,))
    assert bench.asker.engine.counters.num_requests == before
    assert "| companions | 1 : 1 |\n" in (tmp_path / "companions.md").read_text()
