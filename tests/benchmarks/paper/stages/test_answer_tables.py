"""Tables and results computed from raw rows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from benchmarks.paper.stages.ablations import methods_of, numbers_table, weights_table
from benchmarks.paper.stages.answer_tables import Answers, by_coverage, differences, figures, main_table, own_adapters

CLUSTERS = {"a": "first", "b": "first", "c": "second"}


@pytest.fixture
def answers() -> Answers:
    """40 questions per task: `perfect` is right on all of a and b and half of c; `mixture_ood` on a quarter of all."""
    shares = {
        "perfect": {"a": 1, "b": 1, "c": 2},
        "mixture_ood": {"a": 4, "b": 4, "c": 4},
        "base": {"a": 99} | {"b": 99, "c": 99},
    }
    rows = [
        {"run": run, "task": task, "number": number, "score": float(number % every == every - 1)}
        for run, tasks in shares.items()
        for task, every in tasks.items()
        for number in range(40)
    ]
    return Answers(pd.DataFrame(rows).sample(frac=1, random_state=0), CLUSTERS)


def test_tasks_have_equal_weight_and_intervals_resample_questions(answers: Answers) -> None:
    whole = answers.interval("perfect")
    assert whole.mean == pytest.approx((1 + 1 + 0.5) / 3)
    half = 1.96 * np.sqrt(0.25 / 40) / 3  # a and b do not vary
    assert whole.high - whole.mean == pytest.approx(half, rel=0.25) and whole.mean - whole.low == pytest.approx(
        half, rel=0.25
    )
    assert answers.interval("perfect", "first") == (1, 1, 1)


def test_a_difference_is_paired_by_question(answers: Answers) -> None:
    found = answers.difference("perfect", "mixture_ood")
    assert found.mean == pytest.approx((0.75 + 0.75 + 0.25) / 3)
    assert "| 3 / 0 |" in differences(answers, [("perfect", "mixture_ood")])
    assert "| 0 / 3 |" in differences(answers, [("mixture_ood", "perfect")])
    assert "perfect − base | 83.3" in differences(answers, [("perfect", "base"), ("perfect", "absent")])


@pytest.mark.parametrize(
    ("has_own", "cells"), [(True, ["2", "100.0", "0.0", "-50.0"]), (False, ["1", "0.0", "0.0", "100.0"])]
)
def test_a_baseline_is_compared_with_and_without_the_tasks_whose_adapter_it_has(
    has_own: bool, cells: list[str]
) -> None:
    """The baseline is right on a and b, whose adapters it has, and wrong elsewhere."""
    shares = {
        "moe_soft": {"a": 1, "b": 1, "c": 0},
        "mixture_ood": {"a": 0, "b": 0, "c": 1},
        "mixture_iid": {"a": 1, "b": 0, "c": 0},
        "selection_iid": {"a": 1, "b": 1, "c": 1},
    }
    rows = [
        {"run": run, "task": task, "number": number, "score": float(right)}
        for run, tasks in (shares | {"selection_ood": dict.fromkeys("abc", 0)}).items()
        for task, right in tasks.items()
        for number in range(3)
    ]
    held = {"moe_soft": ["a", "b"], "smear": ["a", "b"]}
    [line] = by_coverage(pd.DataFrame(rows), held, "iid" if has_own else "ood", has_own=has_own).splitlines()[2:]
    assert [cell.split(" ")[0] for cell in line.strip("| ").split(" | ")] == ["moe", *cells]
    [line] = by_coverage(pd.DataFrame(rows), held, "iid", has_own=False).splitlines()[2:]
    score = float(100 * shares["moe_soft"]["c"])
    assert [cell.split(" ")[0] for cell in line.strip("| ").split(" | ")][2:] == [
        f"{value:.1f}" for value in (score, 100 - score, 0 - score)
    ]


def test_every_tasks_adapter_is_compared_with_base_and_guesses() -> None:
    shares = {"perfect": 1.0, "base": 0.25, "majority": 0.5}
    rows = [
        {"run": run, "task": task, "number": number, "score": share}
        for run, share in shares.items()
        for task in "ab"
        for number in range(3)
    ]
    lines = own_adapters(Answers(pd.DataFrame(rows), {})).splitlines()[2:]
    cells = "100.0 | 25.0 | 50.0 | 75.0 (75.0 to 75.0) | 50.0 (50.0 to 50.0)"
    assert lines == [f"| a | {cells} |", f"| b | {cells} |"]


def test_the_table_has_a_row_per_cluster_and_all_tasks_last(answers: Answers) -> None:
    lines = main_table(answers).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        "first (2)",
        "second (1)",
        "**all tasks**",
        "95 % interval",
    ]
    column = answers.runs.index("perfect") + 1
    assert [line.strip("| ").split(" | ")[column] for line in lines[2:5]] == ["100.0", "50.0", "**83.3**"]


def test_results_are_shares_of_one_with_bounds(answers: Answers) -> None:
    found = figures(answers)
    assert set(found) == {
        f"score_{run}{end}" for run in ("perfect_iid", "mixture_ood", "base_iid") for end in ("", "_lo", "_hi")
    }
    assert found["score_mixture_ood"] == 0.25 and found["score_mixture_ood_lo"] < 0.25 < found["score_mixture_ood_hi"]


def test_tasks_that_are_alone_in_their_cluster_are_shown_together() -> None:
    clusters = {"a": "first", "b": "first", "c": "second", "d": "third", "elsewhere": "second"}
    rows = [{"run": "own", "task": task, "number": 0, "score": 1.0} for task in "abcd"]
    names = [line.split(" | ")[0] for line in main_table(Answers(pd.DataFrame(rows), clusters)).splitlines()[2:4]]
    assert names == ["| first (2)", "| clusters of one task (2)"]


def test_the_interval_of_a_difference_covers_other_tasks(answers: Answers) -> None:
    """Tasks a and b differ by three quarters and c by a quarter, so the tasks drawn decide."""
    wide, here = answers.difference("perfect", "mixture_ood"), answers.difference_here("perfect", "mixture_ood")
    assert wide.mean == here.mean and wide.high - wide.low > 1.5 * (here.high - here.low)


def test_the_ablation_has_a_row_per_number_and_compares_the_weights() -> None:
    rows = [
        {"run": run, "task": task, "number": number, "score": float(number % 2)}
        for run in methods_of((1, 3))
        for task in "ab"
        for number in range(4)
    ]
    answers = Answers(pd.DataFrame(rows), {"a": "m", "b": "m"})
    assert [line.split(" | ")[0] for line in numbers_table(answers, (1, 3)).splitlines()[2:]] == ["| 1", "| 3"]
    assert "softmax iid − mixture k3 iid | 0.0 (0.0 to 0.0)" in weights_table(answers)
