"""Verdicts, and the claims over the committed rows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from benchmarks.paper.common.intervals import Interval
from benchmarks.paper.stages import claims
from benchmarks.paper.stages.answer_tables import BASELINES, ROUTED, ROWS
from benchmarks.paper.stages.claim_list import of_file
from benchmarks.paper.stages.claims import Claim, Results, claims_table, judged_claims, verdict


@pytest.mark.parametrize(
    ("expected", "low", "high", "found"),
    [
        ("above", 0.01, 0.2, "holds"),
        ("above", -0.01, 0.2, "open"),
        ("above", -0.2, -0.01, "fails"),
        ("at least", -0.02, 0.2, "holds"),
        ("at least", -0.04, 0.2, "open"),
        ("at least", -0.2, -0.04, "fails"),
        ("at least", -0.2, -0.02, "open"),
        ("equal", -0.02, 0.02, "holds"),
        ("equal", -0.02, 0.05, "open"),
        ("equal", 0.04, 0.05, "fails"),
        ("equal", -0.05, -0.04, "fails"),
        # A bound that other seeds of the resampling would move to the other side.
        ("above", 0.004, 0.2, "open"),
        ("above", -0.2, -0.004, "open"),
        ("at least", -0.026, 0.2, "open"),
        ("at least", -0.2, -0.034, "open"),
        ("equal", -0.026, 0.02, "open"),
        ("equal", 0.034, 0.05, "open"),
    ],
)
def test_a_verdict_needs_the_whole_interval(expected: claims.Expected, low: float, high: float, found: str) -> None:
    assert verdict(expected, Interval((low + high) / 2, low, high)) == found


def rows_of(scores: dict[str, dict[str, float]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"run": run, "task": task, "number": number, "score": value}
            for run, tasks in scores.items()
            for task, value in tasks.items()
            for number in range(3)
        ]
    )


def test_the_best_router_is_the_one_that_is_best_on_the_tasks_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    routers = {run: {"a": 0.0, "b": 0.5} for run in ROUTED} | {"moe_top1": {"a": 1.0, "b": 0.0}}
    rows_of({"mixture_iid": {"a": 0.5, "b": 0.0}, "mixture_ood": {"a": 0.0, "b": 1.0}}).to_parquet(tmp_path / ROWS)
    rows_of(routers).to_parquet(tmp_path / BASELINES)
    monkeypatch.setattr(Results, "experts", ["a"])
    results = Results(tmp_path)
    assert results.of_tasks("mixture_iid", ROUTED, with_expert=True) == (-0.5, -0.5, -0.5)
    assert results.of_tasks("mixture_ood", ROUTED, with_expert=False) == (0.5, 0.5, 0.5)
    layers = routers | {"smear": {"a": 0.25, "b": 1.0}, "moe_top1": {"a": 0.0, "b": 0.0}}
    rows_of(layers | {"mixture_iid": {"a": 1.0, "b": 0.0}}).to_parquet(tmp_path / "layers.parquet")
    assert results.of_tasks("mixture_iid", ROUTED, ("layers.parquet",), with_expert=True) == (0.75, 0.75, 0.75)


def test_a_claim_without_rows_is_not_judged(tmp_path: Path) -> None:
    rows_of({"one": {"a": 1.0, "b": 1.0}, "other": {"a": 0.0, "b": 0.0}}).to_parquet(tmp_path / "r.parquet")
    made = [
        Claim("It helps.", "1 and 0", "auto", (name,), "above", of_file("r.parquet", "one", "other"), "Because.")
        for name in ("r.parquet", "absent.parquet")
    ]
    lines = claims_table(made, Results(tmp_path)).splitlines()[2:]
    assert lines == [
        "| It helps. | 1 and 0 | 100.0 and 0.0: 100.0 (100.0 to 100.0) | **holds** | Because. | `auto --per-task 3` |",
        "| It helps. | 1 and 0 | not measured yet | – | – | `auto` |",
    ]


def test_the_results_have_every_measured_claim(tmp_path: Path) -> None:
    rows_of({"one": {"a": 0.0, "b": 0.5}, "other": {"a": 1.0, "b": 1.0}}).to_parquet(tmp_path / "r.parquet")
    made = [
        Claim(f"It helps {name}.", "–", "auto", (name,), "above", of_file(name, "one", "other"), "Because.")
        for name in ("r.parquet", "absent.parquet")
    ]
    [found] = judged_claims(made, Results(tmp_path))
    assert found["claim"] == "It helps r.parquet." and found["stage"] == "auto --per-task 3"
    assert (found["points"], found["low"], found["high"], found["verdict"]) == (-75.0, -100.0, -50.0, "fails")
