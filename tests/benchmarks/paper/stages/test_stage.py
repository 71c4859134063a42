"""A stage writes its rows, tables and numbers, and computes no answer twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import results_file
from benchmarks.paper.answering.methods import MAIN
from benchmarks.paper.answering.runs import run_all
from benchmarks.paper.stages import ablations, defaults, integers, lorahub, main_table, second_base, sizes, stage
from benchmarks.paper.stages.stage import Loaded, Stage, write_stage
from benchmarks.results_file import TreeChanged

STAGES = [module.STAGE for module in (main_table, ablations, lorahub, sizes, second_base, defaults, integers)]


@pytest.mark.parametrize("measured", STAGES, ids=lambda each: each.name)
def test_every_stage_is_a_command_with_its_own_defaults(measured: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(typer, "run", ran.append)
    stage.run(measured)
    app = typer.Typer()
    app.command()(ran[0])
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    assert f"[default: {measured.per_task}]" in shown and f"[default: {measured.encoder}]" in shown


def test_the_results_of_a_stage_are_its_rows_its_tables_and_its_numbers(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    rows = run_all(loaded.bench, MAIN, 2, tmp_path / "raw")
    before = loaded.bench.asker.engine.counters.num_requests
    assert run_all(loaded.bench, MAIN, 2, tmp_path / "raw") == rows
    assert loaded.bench.asker.engine.counters.num_requests == before, "known answers are not computed again"
    write_stage(main_table.STAGE, rows, tmp_path)
    text = (tmp_path / "answers.md").read_text()
    assert "3 tasks, 2 questions each" in text and "| perfect | 100.0 (100.0 to 100.0) | 100.0 |" in text
    assert "| Own adapters are better than the base model. | perfect − base | 100.0" in text
    written = json.loads((tmp_path / "paper" / "results.json").read_text())
    assert written["figures"]["answers_perfect"] == 1.0 and written["figures"]["answers_base"] == 0.0
    assert (tmp_path / "answers.parquet").is_file() and [run["part"] for run in written["runs"]] == ["answers"]


def test_a_changed_tree_leaves_the_results_of_a_stage_alone(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    rows = run_all(loaded.bench, MAIN, 2, tmp_path / "raw")
    write_stage(main_table.STAGE, rows, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("answers.*")}
    monkeypatch.setattr(results_file, "commit", lambda: "0123456789ab+")
    with pytest.raises(TreeChanged):
        write_stage(main_table.STAGE, rows.slice(0, len(rows) // 2), tmp_path)
    assert len(before) == 2 and {path: path.read_bytes() for path in before} == before
    assert {path.name for path in tmp_path.glob("*.unclean.*")} == {"answers.unclean.parquet", "answers.unclean.md"}
