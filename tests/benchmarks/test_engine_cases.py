"""The order of a round's cases, and the table's ranges."""

from __future__ import annotations

from benchmarks.engine_cases import in_turn, with_range


def test_two_rounds_give_every_case_the_same_sum_of_places() -> None:
    cases = ["engine", "http", "auto"]
    rounds = [list(in_turn(cases, number)) for number in (1, 2)]
    assert rounds[0] == cases
    assert {case: rounds[0].index(case) + rounds[1].index(case) for case in cases} == dict.fromkeys(cases, 2)


def test_a_range_is_shown_only_for_several_rounds() -> None:
    assert with_range([0.5]) == "0.50"
    assert with_range([0.9, 0.5, 0.7]) == "0.70 (0.50 to 0.90)"
