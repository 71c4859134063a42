"""The table that compares every way to choose and to compose over both pools."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.paper.stages import rerank, rerank_flan


def write_rows(file: Path, scores: dict[str, float], tasks: str) -> None:
    """Write rows of every way, of which those in `scores` have this score and the others 0.5."""
    runs = {f"{way}_{part}": 0.5 for way in (rerank.FIRST, *rerank_flan.WAYS) for part in rerank.POOLS} | scores
    rows = [{"run": run, "task": task, "number": 0, "score": score} for run, score in runs.items() for task in tasks]
    pd.DataFrame(rows).to_parquet(file)


def test_the_table_has_the_points_of_both_pools_against_the_nearest_adapter(tmp_path: Path) -> None:
    lacking = "Both pools were not reranked in the same ways yet."
    write_rows(tmp_path / rerank.ROWS, {"mixture_iid": 0.25, "auto_ood": 0.75}, "abcd")
    assert rerank_flan.both_pools(tmp_path) == lacking
    write_rows(tmp_path / rerank_flan.ROWS, {"mixture_iid": 1.0, "first_ood": 0.25}, "xy")
    words, _, *lines = rerank_flan.both_pools(tmp_path).splitlines()
    assert words.startswith("Points against selection")
    assert lines[0] == "| points against selection | 4 × 1, iid | 4 × 1, ood | 2 × 1, iid | 2 × 1, ood |"
    assert len(lines) == 2 + len(rerank_flan.WAYS)
    cells = {line.split(" | ")[0]: [cell.split(" (")[0] for cell in line.split(" | ")[1:]] for line in lines[2:]}
    assert cells["| the paper's mixture"] == ["-25.0", "0.0", "50.0", "25.0"]
    assert cells["| `auto`, without abstention"] == ["0.0", "25.0", "0.0", "25.0"]
    old = pd.read_parquet(tmp_path / rerank.ROWS)
    old[~old["run"].str.startswith("mixture")].to_parquet(tmp_path / rerank.ROWS)
    assert rerank_flan.both_pools(tmp_path) == lacking
