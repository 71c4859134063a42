"""The measurement of `loraretriever pool evaluate`, on the tiny study with the packaged encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from rich.progress import Progress

from benchmarks import results_file
from benchmarks.paper.answering.stores import packaged_encoder
from benchmarks.paper.common.resumable import write_parquet
from benchmarks.paper.common.tasks import read_task_list
from benchmarks.paper.pool.choose import read_pool
from benchmarks.paper.pool.train_pool import train_on
from benchmarks.paper.stages import competence
from benchmarks.paper.stages.conflicts import FLIPPED, HALVES, copies_of
from benchmarks.paper.stages.main_table import Loaded
from tests.benchmarks.paper.stages.test_stages import two_answers
from tests.benchmarks.tiny_study import RECIPE, SPECS

PER_TASK = 4


@pytest.fixture(scope="module")
def measured(loaded: Loaded, tiny_folders: Mapping[str, Path]) -> competence.Competence:
    study, spec = loaded.bench.study, SPECS[0]
    made = copies_of(two_answers(study.parts[spec.name]))
    half = study.parts[spec.name]
    copies = {
        f"{spec.name}{FLIPPED}": made[FLIPPED],
        f"{spec.name}{HALVES[0]}": replace(half, train=half.train[::2], samples=half.train[:20]),
    }
    workspace = replace(study.workspace, root=study.workspace.root)
    with Progress(disable=True) as progress:
        train_on(copies, dict.fromkeys(copies, RECIPE), workspace, tiny_folders["gemma3"], progress)
    return competence.Competence(loaded, [spec], copies, packaged_encoder())


def test_a_twin_without_samples_answers_for_the_withdrawn_adapter(
    measured: competence.Competence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    twins = measured.twin_rows(PER_TASK)
    chosen = twins.to_pandas()["chosen"]
    assert len(chosen) == PER_TASK and (chosen == "animals.twin").sum() >= PER_TASK - 1
    rows = measured.rows(PER_TASK)
    found = rows.to_pandas()
    alone = {"own", "copy", "own_flipped_0.25", "own_flipped_0.5"}
    adapters = found.groupby("run")["adapters"].agg(lambda rows: {name for names in rows for name in names})
    assert adapters["copy"] == {"animals.flipped"} and adapters["own_flipped_0.25"] == {"animals", "animals.flipped"}
    weights = found[found["run"] == "own_flipped_0.25"]["weights"]
    assert all(list(own) == [0.75, 0.25] for own in weights)
    assert set(found["run"]) == {*alone, *(f"{p}_{w}" for p in ("plain", "flipped", "measured") for w in WAYS)}
    write_parquet(tmp_path / competence.ROWS, rows)
    write_parquet(tmp_path / competence.TWINS, twins)
    competence.write_tables(tmp_path)
    assert "| measured selection |" in (tmp_path / "competence.md").read_text()


WAYS = ("selection", "auto")


def test_the_share_of_twins_is_counted_by_task() -> None:
    rows = [("a", "a.twin"), ("a", "b"), ("b", "b.twin"), ("b", "b.twin")]
    found = competence._twin_shares(pd.DataFrame(rows, columns=["task", "chosen"]))
    assert found == {"a": 0.5, "b": 1.0, "all": 0.75}


def test_tasks_join_the_pool_until_enough_have_a_closed_set_of_answers() -> None:
    pool = read_pool()
    more = competence.further_tasks(pool, 12)
    assert len(more) == 3 and all(spec.labels and spec.name not in pool for spec in more)
    listed = read_task_list().by_name
    assert len(competence.chosen_tasks([listed[name] for name in pool] + more, 12)) == 12
    assert competence.further_tasks(pool, 9) == competence.further_tasks(pool, 4) == []


def test_the_sentence_says_how_many_tasks_were_measured(tmp_path: Path) -> None:
    assert "not measured yet" in competence.sentence(tmp_path)
    means = {"own": 1.0, "plain_selection": 1.0, "flipped_selection": 0.5, "measured_selection": 1.0}
    rows = [
        {"run": run, "task": task, "number": number, "score": float(number < 2 * mean)}
        for run, mean in means.items()
        for task in "abc"
        for number in range(2)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / competence.ROWS)
    text = competence.sentence(tmp_path)
    assert (
        "of 3 tasks in the pool (2 questions each), selection changes by -50.0" in text and "by a further 50.0" in text
    )
