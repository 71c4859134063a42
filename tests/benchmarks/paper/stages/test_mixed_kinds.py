"""Mixtures of adapters of several kinds, on the tiny study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.progress import Progress

from benchmarks.paper.answering.methods import Perfect
from benchmarks.paper.answering.runs import Bench
from benchmarks.paper.common.workspace import Workspace
from benchmarks.paper.pool.train_pool import recipe_of, train_on
from benchmarks.paper.stages import mixed_kinds
from benchmarks.paper.stages.answer_tables import Answers
from benchmarks.paper.stages.mixed_kinds import KINDS, RUNS, Mixtures, folders_of, name_of, runs_of
from benchmarks.training.adapter_files import load_base
from tests.benchmarks.tiny_study import RECIPE, SPECS


@pytest.fixture(scope="module")
def mixtures(bench: Bench, tiny_folders: Mapping[str, Path]) -> Mixtures:
    study, base = bench.study, tiny_folders["gemma3"]
    others = Workspace(study.workspace.root / "mixed_kinds")
    names = {name_of(spec.name, kind): (spec.name, kind) for spec in SPECS for kind in KINDS[1:]}
    recipes = {name: replace(RECIPE, kind=kind, num_steps=1) for name, (_, kind) in names.items()}
    with Progress(disable=True) as progress:
        train_on({name: study.parts[task] for name, (task, _) in names.items()}, recipes, others, base, progress)
    return Mixtures(
        load_base(base), folders_of([spec.name for spec in SPECS], study.workspace, others), study.tokenizer
    )


def test_a_lora_adapter_answers_as_in_the_engine(bench: Bench, mixtures: Mixtures) -> None:
    questions = bench.study.questions("test", 2)
    plans = Perfect().plans(bench.retriever, questions)
    wanted = bench.asker.answers(list(zip(questions, plans, strict=True)), bench.out, "own")
    assert mixtures.answers(questions, [{q.task: 1.0} for q in questions]) == wanted
    assert len(set(wanted)) == len(SPECS)


def test_the_own_adapter_has_one_or_three_times_the_weight_of_a_companion() -> None:
    found = runs_of("a", ["b", "c"])
    assert tuple(found) == RUNS and found["base"] == {}
    assert found["dora_alone"] == {"a.dora": 1.0}
    assert found["ia3_equal"] == pytest.approx({"a.ia3": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    assert found["lora_3to1"] == pytest.approx({"a": 0.6, "b": 0.2, "c": 0.2})
    assert found["kinds_equal"] == pytest.approx({"a": 1 / 3, "a.dora": 1 / 3, "a.ia3": 1 / 3})


def test_each_kind_is_trained_by_the_tasks_own_recipe() -> None:
    own = recipe_of(SPECS[0])
    assert mixed_kinds.kind_recipe(SPECS[0], "dora") == replace(own, kind="dora")
    ia3 = mixed_kinds.kind_recipe(SPECS[0], "ia3")
    assert replace(ia3, learning_rate=own.learning_rate) == replace(own, kind="ia3")


def test_the_stage_answers_in_every_composition_once(bench: Bench, mixtures: Mixtures, tmp_path: Path) -> None:
    mixed_kinds.measure(bench, mixtures, "tiny", tmp_path, 1)
    rows = pd.read_parquet(tmp_path / mixed_kinds.ROWS)
    assert set(rows["run"]) == set(RUNS) and rows.groupby("run").size().eq(len(SPECS)).all()
    for row in rows[rows["run"] == "dora_3to1"].itertuples():
        weights = dict(zip(row.adapters, row.weights, strict=True))
        assert weights.pop(f"{row.task}.dora") == pytest.approx(0.6, abs=1e-3)
        assert set(weights) == {spec.name for spec in SPECS} - {row.task}
    assert rows[rows["run"] == "lora_alone"]["score"].mean() == 1.0 > rows[rows["run"] == "base"]["score"].mean()
    texts = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.md")}
    assert list(texts) == ["mixed_kinds.md"] and "| ia3 |" in (tmp_path / "mixed_kinds.md").read_text()
    steps = list((bench.study.workspace.rows / "mixed_kinds").rglob("*.parquet"))
    before = {path: path.stat().st_mtime_ns for path in steps}
    mixed_kinds.measure(bench, mixtures, "tiny", tmp_path, 1)
    assert len(before) == len(RUNS) and all(path.stat().st_mtime_ns == value for path, value in before.items())


def test_a_kinds_loss_is_compared_with_that_of_lora() -> None:
    """Mixing takes a half from DoRA and a quarter from LoRA, on both tasks."""
    means = {"dora_alone": 1.0, "dora_equal": 0.5, "lora_alone": 1.0, "lora_equal": 0.75}
    rows = [
        {"run": run, "task": task, "number": number, "score": float(number < 4 * mean)}
        for run, mean in means.items()
        for task in "ab"
        for number in range(4)
    ]
    found = mixed_kinds.more_lost(Answers(pd.DataFrame(rows), {}), "dora", "equal")
    assert np.isclose(found.mean, -0.25) and found.low < found.mean < found.high


def test_the_sentence_names_what_companions_change(tmp_path: Path) -> None:
    assert "not measured yet" in mixed_kinds.sentence(tmp_path)
    means = {run: 1.0 for run in RUNS} | {"ia3_equal": 0.5}
    rows = [
        {"run": run, "task": task, "number": number, "score": float(number < 2 * mean)}
        for run, mean in means.items()
        for task in "ab"
        for number in range(2)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / mixed_kinds.ROWS)
    text = mixed_kinds.sentence(tmp_path)
    assert "on 2 tasks" in text and "100.0 % (LoRA), 100.0 % (DoRA), 100.0 % (IA³)" in text and "-50.0 (" in text
