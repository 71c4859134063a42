"""Scores, tables and verdicts from raw rows."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from benchmarks.paper.common.intervals import Interval
from benchmarks.paper.stages.answers import (
    Answers,
    Claim,
    Expected,
    arms_table,
    claims_table,
    collect_figures,
    verdict,
)
from benchmarks.results_file import RESULTS


@pytest.fixture
def answers() -> Answers:
    """40 questions per task: `perfect` is right on all of a and b and half of c; `mixture_ood` on a quarter of all."""
    shares = {
        "perfect": {"a": 1, "b": 1, "c": 2},
        "mixture_ood": {"a": 4, "b": 4, "c": 4},
        "base": {"a": 99, "b": 99, "c": 99},
    }
    adapters = {"perfect": lambda task, number: [task], "mixture_ood": lambda task, number: ["x", "abc"[number % 3]]}
    rows = [
        {"run": run, "task": task, "number": number, "score": float(number % every == every - 1)}
        | {"adapters": adapters.get(run, lambda task, number: [])(task, number), "weights": [0.4, 0.6]}
        for run, tasks in shares.items()
        for task, every in tasks.items()
        for number in range(40)
    ]
    rows = [row | {"weights": row["weights"][: len(row["adapters"])]} for row in rows]
    return Answers(pd.DataFrame(rows).sample(frac=1, random_state=0))


def test_tasks_have_equal_weight_and_intervals_resample_questions(answers: Answers) -> None:
    whole = answers.interval("perfect")
    assert whole.mean == pytest.approx((1 + 1 + 0.5) / 3)
    half = 1.96 * np.sqrt(0.25 / 40) / 3  # a and b do not vary
    assert whole.high - whole.mean == pytest.approx(half, rel=0.25)
    assert whole.mean - whole.low == pytest.approx(half, rel=0.25)


def test_a_difference_is_paired_by_question_and_covers_other_tasks(answers: Answers) -> None:
    found = answers.difference("perfect", "mixture_ood")
    assert found.mean == pytest.approx((0.75 + 0.75 + 0.25) / 3)
    assert found.high - found.low > 0.3, "the tasks drawn decide: two differ by three quarters, one by a quarter"


def test_the_adapter_with_the_largest_weight_counts_as_the_first(answers: Answers) -> None:
    assert answers.share_own_first("perfect") == 1.0
    assert answers.share_own_first("mixture_ood") == pytest.approx(1 / 3, abs=0.02)
    assert answers.share_own_first("base") is None


def test_each_arm_and_each_measured_claim_has_a_row(answers: Answers) -> None:
    arms = arms_table(answers).splitlines()[2:]
    assert sorted(line.split(" | ")[0] for line in arms) == ["| base", "| mixture ood", "| perfect"]
    assert any("| 83.3 (" in line and line.endswith("| 100.0 |") for line in arms)
    claims = [Claim("Own is better.", "perfect", "base"), Claim("Not measured.", "perfect", "fusion")]
    [line] = claims_table(answers, claims).splitlines()[2:]
    assert line.startswith("| Own is better. | perfect − base | 83.3 (") and line.endswith("| **holds** |")


def test_numbers_are_shares_of_one_with_bounds(answers: Answers) -> None:
    found = collect_figures(answers, "main")
    arms = ("perfect", "mixture_ood", "base")
    assert set(found) == {f"main_{run}{end}" for run in arms for end in ("", "_lo", "_hi")}
    assert found["main_mixture_ood_lo"] < found["main_mixture_ood"] == 0.25 < found["main_mixture_ood_hi"]


@pytest.mark.parametrize(
    ("expected", "low", "high", "said"),
    [
        ("above", 0.006, 0.1, "holds"),
        ("above", 0.004, 0.1, "open"),
        ("above", -0.1, -0.006, "fails"),
        ("above", -0.1, -0.004, "open"),
        ("equal", -0.02, 0.02, "holds"),
        ("equal", -0.026, 0.02, "open"),
        ("equal", -0.2, -0.036, "fails"),
        ("equal", 0.036, 0.2, "fails"),
        ("at least", -0.02, 0.3, "holds"),
        ("at least", -0.03, 0.3, "open"),
        ("at least", -0.3, -0.04, "fails"),
    ],
)
def test_the_verdict_follows_from_the_whole_interval(expected: Expected, low: float, high: float, said: str) -> None:
    assert verdict(expected, Interval((low + high) / 2, low, high)) == said


def test_the_report_and_the_results_file_give_each_claim_the_same_verdict() -> None:
    runs = json.loads((RESULTS / "paper" / "results.json").read_text(encoding="utf-8"))["runs"]
    [rows] = [run["rows"] for run in runs if run["part"] == "claims"]
    report = (RESULTS.parent / "paper" / "REPORT.md").read_text(encoding="utf-8").splitlines()
    printed = {row["claim"]: [line for line in report if line.startswith(f"| {row['claim']} |")] for row in rows}
    assert len(printed) == len(rows) == 61
    for row in rows:
        assert [f"| **{row['verdict']}** |" in line for line in printed[row["claim"]]] == [True], row["claim"]
