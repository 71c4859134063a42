"""The measurement of `loraretriever evaluate`, on the tiny study with the packaged encoder."""

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
    assert set(found["run"]) == {"own", *(f"{p}_{w}" for p in ("plain", "flipped", "measured") for w in WAYS)}
    write_parquet(tmp_path / competence.ROWS, rows)
    write_parquet(tmp_path / competence.TWINS, twins)
    competence.write_tables(tmp_path)
    assert "| measured selection |" in (tmp_path / "competence.md").read_text()


WAYS = ("selection", "auto")


def test_the_share_of_twins_is_counted_by_task() -> None:
    rows = [("a", "a.twin"), ("a", "b"), ("b", "b.twin"), ("b", "b.twin")]
    found = competence._twin_shares(pd.DataFrame(rows, columns=["task", "chosen"]))
    assert found == {"a": 0.5, "b": 1.0, "all": 0.75}
