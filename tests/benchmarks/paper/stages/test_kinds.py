"""Other kinds of adapters are refused by name; variants of LoRA are admitted."""

from __future__ import annotations

import pytest

from benchmarks.paper.stages.kinds import answers, section

ADMITTED = {"LoRA", "LoRA, rsLoRA scaling", "LoRA, ranks and scalings by module"}


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    return answers()


def test_loras_of_any_rank_and_scaling_are_admitted_and_nothing_else(found: dict[str, list[str]]) -> None:
    assert {kind for kind, reasons in found.items() if not reasons} == ADMITTED


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("LoRA, DoRA", "dora"),
        ("LoHa", "LOHA"),
        ("prompt tuning", "PROMPT_TUNING"),
        ("LoRA, of another architecture", "base"),
    ],
)
def test_the_reason_names_the_kind(found: dict[str, list[str]], kind: str, word: str) -> None:
    assert any(word.lower() in reason.lower() for reason in found[kind]), found[kind]


def test_the_section_has_a_row_per_kind(found: dict[str, list[str]]) -> None:
    lines = section(found).splitlines()
    assert sum(line.startswith("| ") for line in lines) == len(found) + 2
