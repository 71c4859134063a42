"""Scores of answers."""

from __future__ import annotations

import pytest

from benchmarks.paper.common.scoring import majority_scores, score
from benchmarks.training.bigbench_tasks import Item, TaskSpec


@pytest.mark.parametrize(("generated", "expected"), [("yes\nBecause", 1.0), ("Yes.", 0.0), ("no", 1.0), ("", 0.0)])
def test_the_first_line_has_to_be_an_accepted_answer(generated: str, expected: float) -> None:
    assert score(TaskSpec("t", "t", "c", "{x}", "em", ()), Item("", ("no", "yes")), generated) == expected


def test_free_text_is_scored_by_its_common_words_in_order() -> None:
    spec, item = TaskSpec("t", "t", "c", "{x}", "rouge_l", ()), Item("", ("A red boat.",))
    assert score(spec, item, "a red boat") == 1.0
    assert score(spec, item, "boat red") == pytest.approx(2 * 1 / (2 + 3))


def test_the_better_of_the_commonest_answer_and_a_random_option_is_the_guess() -> None:
    spec = TaskSpec("t", "t", "c", "{x}\nOPTIONS:\n{o}", "acc", ())
    train = [Item("", ("b",)), Item("", ("b",)), Item("", ("a",))]
    items = [Item("", ("a",), 4), Item("", ("b",), 4), Item("", ("b",), 4)]
    assert majority_scores(spec, train, items) == [0.0, 1.0, 1.0]
    assert majority_scores(spec, train, [Item("", ("a",), 4)] * 3) == [0.25] * 3
