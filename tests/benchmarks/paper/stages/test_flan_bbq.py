"""A second pool like Flan."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.paper.common.tasks import read_task_list
from benchmarks.paper.stages import flan_bbq
from benchmarks.paper.stages.answer_tables import Answers


def answers_of(scores: dict[str, dict[str, float]]) -> pd.DataFrame:
    """Return rows of one question for each run and task."""
    rows = [(run, task, 0, score) for run, by_task in scores.items() for task, score in by_task.items()]
    return pd.DataFrame(rows, columns=["run", "task", "number", "score"])


def both(ambig: float, disambig: float) -> dict[str, float]:
    return {
        f"bbq_{subject}_{end}": score for end, score in (("ambig", ambig), ("disambig", disambig)) for subject in "ab"
    }


ROWS = answers_of(
    {
        "perfect": both(1.0, 0.5),
        "mixture_iid": both(1.0, 0.0),
        "selection_iid": both(0.5, 0.25),
        "mixture_ood": both(0.75, 0.25),
        "selection_ood": both(0.25, 0.25),
        "majority": both(0.25, 0.5),
    }
)


def test_the_pool_has_every_subject_in_both_functions() -> None:
    names = [spec.name for spec in flan_bbq.bbq_tasks(list(read_task_list().by_name.values()))]
    assert names == sorted(set(names)) and len(names) >= 12
    by_function = [
        {name.rpartition("_")[0] for name in names if flan_bbq.function_of(name) == f} for f in flan_bbq.FUNCTIONS
    ]
    assert by_function[0] == by_function[1] and len(by_function[0]) * 2 == len(names)


def test_the_sentence_has_the_scores_of_the_rows(tmp_path: Path) -> None:
    assert "not measured yet" in flan_bbq.sentence(tmp_path)
    ROWS.to_parquet(tmp_path / flan_bbq.ROWS)
    found = flan_bbq.sentence(tmp_path)
    assert "On the 4 tasks of bbq" in found and "the mixture has 50.0 % in distribution and selection 37.5 %" in found
    assert "out of distribution 50.0 and 25.0 % (guessing 37.5 %)" in found
    assert "leads of 12.5 (" in found and "and 25.0 (" in found
    assert "The second is 50.0 (50.0 to 50.0) on" in found and "and 0.0 (0.0 to 0.0) on the others." in found


def test_differences_are_those_of_each_functions_own_tasks() -> None:
    lines = flan_bbq.by_function(Answers(ROWS, {})).splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:] if line}
    assert cells == {
        "ambig": ["50.0 (50.0 to 50.0)", "50.0 (50.0 to 50.0)", "50.0 (50.0 to 50.0)"],
        "disambig": ["-25.0 (-25.0 to -25.0)", "0.0 (0.0 to 0.0)", "-25.0 (-25.0 to -25.0)"],
    }


def test_the_appendix_compares_the_methods_and_has_a_line_for_each_function() -> None:
    text = flan_bbq.section(ROWS)
    assert "4 tasks of bbq, 1 questions each" in text and "mixture iid − selection iid" in text
    assert "| ambig | 50.0" in text and "ambig (2)" in text
