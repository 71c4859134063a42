"""The page about benchmarks prints numbers of result files, and no others where there is a result file."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from docs.generate.__main__ import DOCS
from docs.generate.benchmark_numbers import BENCHMARK_BLOCKS, RESULTS, NumberTable, measured, numbers_of, results_of

PAGE = (DOCS / "benchmarks" / "index.md").read_text(encoding="utf-8")
GENERATED = ("Throughput", "Other servers", "Over HTTP", "Choosing adapters", "Latency", "Large pools", "Publishing")
TABLES = {name: block for name, block in BENCHMARK_BLOCKS.items() if isinstance(block, NumberTable)}


def result_of(study: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / study / "results.json").read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_the_numbers_of_its_study_rounded(name: str) -> None:
    """Every number of a cell is one of the study, to its last digit. A share may be in per cent."""
    block = TABLES[name]
    _, _, *rows = [line.split("|")[2:-1] for line in block().splitlines() if line.startswith("|")]
    results = results_of(block.study)
    for result, cells in zip(results, zip(*rows, strict=True), strict=True):
        numbers = [number for cell in cells for number in re.findall(r"\d+(?:\.\d+)?", cell)]
        figures = numbers_of(block.study, result).values()
        for number in numbers:
            digits = len(number.partition(".")[2])
            assert any(number in (f"{value:.{digits}f}", f"{100 * value:.{digits}f}") for value in figures), number
    assert len(rows) == len(block.rows) and all(re.search(r"\d", " ".join(row)) for row in rows), "a row has no number"


@pytest.mark.parametrize("title", GENERATED)
def test_a_section_with_result_files_has_no_table_by_hand(title: str) -> None:
    [section] = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    outside, num_blocks = re.subn(r"<!-- generated: .*?<!-- end of generated -->", "", section, flags=re.DOTALL)
    assert num_blocks >= 1 and "|" not in outside


def test_the_origin_of_a_table_names_day_commit_and_machine() -> None:
    result = result_of("latency")
    for part in (result["date"][:10], result["commit"][:7], "2 cores"):
        assert part in measured("latency")
