"""Scores of answers with and without full stops."""

from __future__ import annotations

import pytest

from benchmarks.paper.common.scoring import score, score_without_dots
from benchmarks.training.bigbench_tasks import Item, TaskSpec


@pytest.mark.parametrize(
    ("generated", "with_dots", "without_dots"),
    [("Yes.\nBecause", 0.0, 1.0), ("yes", 1.0, 1.0), ("y.e.s", 0.0, 1.0), ("yes!", 0.0, 0.0), ("", 0.0, 0.0)],
)
def test_full_stops_of_the_first_line_count_only_with_dots(
    generated: str, with_dots: float, without_dots: float
) -> None:
    spec, item = TaskSpec("t", "t", "c", "{x}", "em", ()), Item("", ("no", "yes"))
    assert (score(spec, item, generated), score_without_dots(spec, item, generated)) == (with_dots, without_dots)


def test_an_answer_in_free_text_has_no_score_without_dots() -> None:
    spec = TaskSpec("t", "t", "c", "{x}", "rouge_l", ())
    assert score_without_dots(spec, Item("", ("A red boat.",)), "a red boat") is None
