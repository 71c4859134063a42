"""The methods besides those of the paper: each has a file, and its gain is of the rows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.paper.stages import report
from benchmarks.paper.stages.better_methods import BETTER, NOT_MEASURED, methods_table
from benchmarks.paper.stages.claims import Results


def test_every_better_method_has_a_file() -> None:
    root = report.REPORT.parents[2]
    assert len(BETTER) >= 8 and all((root / method.file).exists() for method in BETTER)


def test_abstention_is_compared_with_the_same_composition_without_it(tmp_path: Path) -> None:
    scores = {"auto_iid": 0.5, "auto_iid_always": 0.75, "selection_iid": 1.0, "auto_ood": 0.0, "selection_ood": 0.0}
    rows = [{"run": run, "task": task, "number": 0, "score": score} for run, score in scores.items() for task in "ab"]
    pd.DataFrame(rows).to_parquet(tmp_path / "auto.parquet")
    lines = methods_table(Results(tmp_path)).splitlines()
    [abstention] = [line for line in lines if line.startswith("| abstention")]
    assert "`auto` with − without: -25.0 (-25.0 to -25.0)" in abstention
    assert sum(NOT_MEASURED in line for line in lines) == len(BETTER) - 1
