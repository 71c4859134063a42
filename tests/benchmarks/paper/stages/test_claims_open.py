"""The claims on open questions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.paper.stages import competence, conflicts, mixed_kinds, natural, second_base, stream
from benchmarks.paper.stages.claims import Claim, Results
from benchmarks.paper.stages.claims_open import QUESTIONS


def write(path: Path, scores: Mapping[str, float | Mapping[str, float]], tasks: str = "ab") -> None:
    """Write a file of runs with this score, or this one of each task, on every one of two questions."""
    rows = [
        {"run": run, "task": task, "number": number, "score": value[task] if isinstance(value, Mapping) else value}
        for run, value in scores.items()
        for task in tasks
        for number in range(2)
    ]
    pd.DataFrame(rows).to_parquet(path)


def claim(*words: str) -> Claim:
    [found] = [one for one in QUESTIONS if all(word in one.text for word in words)]
    return found


def test_copies_are_judged_by_the_stage_that_has_more_tasks(tmp_path: Path) -> None:
    quarter = claim("quarter", "exchanged answers")
    write(tmp_path / conflicts.ROWS, {"own": 1.0, "own_flipped_0.25": 0.5})
    write(tmp_path / competence.ROWS, {"own": 1.0}, tasks="abc")
    assert callable(quarter.why)
    before = Results(tmp_path)
    assert quarter.difference(before).mean == -0.5 and quarter.why(before).startswith("2 tasks of 2 questions.")
    write(tmp_path / competence.ROWS, {"own": 1.0, "own_flipped_0.25": 0.75}, tasks="abc")
    after = Results(tmp_path)
    assert quarter.difference(after).mean == -0.25 and quarter.why(after).startswith("3 tasks of 2 questions.")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("second base", "nine tenths"), 0.8 - 0.9 * 0.6),
        (("second base", "mixture"), 0.3 - 0.8),
        (("Averaging",), 0.9 - 0.4),
        (("vote",), 0.7 - 0.4),
    ],
)
def test_a_second_base_is_compared_with_the_named_run(tmp_path: Path, words: tuple[str, ...], expected: float) -> None:
    scores = {"found_first": 0.4, "selection_second": 0.8, "perfect_second": 0.6, "mixture_second": 0.3}
    write(tmp_path / second_base.ROWS, scores | {"averaged_found": 0.9, "voted_found": 0.7})
    assert claim(*words).difference(Results(tmp_path)).mean == pytest.approx(expected)


def test_a_kinds_loss_is_that_of_lora_subtracted(tmp_path: Path) -> None:
    lost = {"lora": 0.3, "dora": 0.5, "ia3": 0.1}
    scores = {f"{kind}_alone": 1.0 for kind in lost} | {f"{kind}_equal": 1 - value for kind, value in lost.items()}
    write(tmp_path / mixed_kinds.ROWS, scores | {mixed_kinds.TOGETHER: 0.8})
    results = Results(tmp_path)
    assert claim("a DoRA").difference(results).mean == pytest.approx(-0.2)
    assert claim("an IA³").difference(results).mean == pytest.approx(0.2)
    assert claim("of one task mix").difference(results).mean == pytest.approx(-0.2)


def why(results: Results, *words: str) -> str:
    found = claim(*words).why
    assert callable(found)
    return found(results)


def test_a_weaker_kind_has_less_to_lose(tmp_path: Path) -> None:
    write(tmp_path / mixed_kinds.ROWS, {"lora_alone": 0.75, "dora_alone": 0.875, "ia3_alone": 0.5})
    results = Results(tmp_path)
    assert why(results, "a DoRA") == "2 tasks, in torch. Alone it has 87.5 %, LoRA 75.0 %."
    assert why(results, "an IA³").endswith("Alone it has 50.0 %, LoRA 75.0 %; a weaker adapter has less to lose.")


def test_tasks_that_lose_by_a_quarter_on_the_rival_are_counted(tmp_path: Path) -> None:
    own_quarter = {"a": 0.5, "b": 1.0, "c": 0.75}
    write(tmp_path / natural.ROWS, {"own": 0.75, "own_0.75": own_quarter, "own_0.9": 0.25}, tasks="abc")
    found = why(Results(tmp_path), "A quarter", "related task")
    assert found.startswith("1 of the 3 tasks lose answers.") and found.endswith("by -50.0 (-50.0 to -50.0).")


def test_the_mixture_of_a_second_base_is_explained_by_that_of_the_first(tmp_path: Path) -> None:
    write(tmp_path / second_base.ROWS, {"mixture_first": 0.25, "selection_first": 0.75, "mixture_second": 1.0})
    found = why(Results(tmp_path), "second base", "mixture")
    assert found.endswith("On the first base: -50.0 (-50.0 to -50.0).")


def test_fewer_own_tasks_found_first_count_against_a_common_index(tmp_path: Path) -> None:
    rows = [
        {"base": base, "task": task, "number": number, "is_own": base == "first" or number == 0}
        for base in ("first", "both", "second")
        for task in "ab"
        for number in range(2)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / second_base.FOUND)
    assert claim("do not harm retrieval").difference(Results(tmp_path)).mean == -0.5


def test_the_requests_for_what_is_new_are_counted_once(tmp_path: Path) -> None:
    rows = [
        {"stretch": stretch, "kind": kind, "method": "auto", "router": router, "task": task, "score": 1.0}
        for router in (stream.FOLLOWS, stream.FROZEN)
        for stretch, kind, task in ((0, "new", "a"), (1, stream.KINDS[0], "b"), (1, "new", "c"), (2, "new", "c"))
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / stream.ROWS)
    assert why(Results(tmp_path), "follows the catalogue").endswith("2 requests for 1 tasks.")
