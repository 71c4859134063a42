"""The page about benchmarks prints numbers of result files, and no others where there is a result file."""

from __future__ import annotations

import json
import re
import statistics
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


def test_results_of_other_kinds_of_processors_have_a_column_and_an_origin_each() -> None:
    amd, intel = results_of("throughput")
    head, *rows = TABLES["results-throughput"]().splitlines()
    assert [cell.split()[-1] for cell in head.split("|")[2:-1]] == ["(AMD)", "(Intel)"]
    [base] = [row.split("|")[2:-1] for row in rows if row.startswith("| base model |")]
    assert [cell.strip() for cell in base] == [f"{each['figures']['base_over_generate']:.2f}" for each in (amd, intel)]
    for each in (amd, intel):
        assert each["commit"][:7] in measured("throughput")


def test_numbers_are_in_the_cells_of_their_rows() -> None:
    figures, cells = result_of("throughput")["figures"], {}
    for line in TABLES["results-throughput"]().splitlines():
        if line.startswith("| "):
            text, numbers = line.split("|")[1:3]
            cells[text.strip()] = re.findall(r"[\d.]+", numbers)
    assert cells["base model"] == [f"{figures['base_over_generate']:.2f}"]
    names = [f"mixture{count}_over_generate" for count in (8, 32, 96)]
    assert cells["mixture of 3, 8 / 32 / 96 active"] == [f"{figures[name]:.2f}" for name in names]


def test_every_runtime_of_the_encoder_has_a_row_with_its_times() -> None:
    lines = BENCHMARK_BLOCKS["results-encoder"]().splitlines()
    rows = [found for line in lines if (found := re.findall(r"([\d.]+) ms(?= \|)", line))]
    results = [result["figures"] for result in results_of("encoder")]
    kinds = [kind for kind in ("server", "bfloat16", "float32") if f"encoder_{kind}_alone_p50_ms" in results[0]]
    assert len(kinds) == sum(name.endswith("_alone_p50_ms") for name in results[0])
    names = [[f"encoder_{kind}_{place}_p50_ms" for place in ("alone", "next_to_worker")] for kind in kinds]
    assert rows == [[f"{figures[name]:.1f}" for figures in results for name in pair] for pair in names]


def test_ratios_of_throughput_are_medians_over_rounds() -> None:
    rounds = [run for run in result_of("throughput")["runs"] if "base x1" in run]
    expected = statistics.median([found["mixture 8 x8"] / found["generate x8"] for found in rounds])
    assert numbers_of("throughput")["mixture 8 x8 / generate x8"] == expected


def test_load_by_clients_has_every_run_of_both_clients() -> None:
    text = BENCHMARK_BLOCKS["load-by-clients"]()
    runs = result_of("load")["runs"]
    assert len(runs) == 6
    for run in runs:
        assert f" {run['tokens_s']:.0f} |" in text and f" {run['ttft_p50_ms']:.0f} |" in text


@pytest.mark.parametrize("title", GENERATED)
def test_a_section_with_result_files_has_no_table_by_hand(title: str) -> None:
    [section] = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    outside, num_blocks = re.subn(r"<!-- generated: .*?<!-- end of generated -->", "", section, flags=re.DOTALL)
    assert num_blocks >= 1 and "|" not in outside


def test_the_origin_of_a_table_names_day_commit_and_machine() -> None:
    result = result_of("latency")
    for part in (result["date"][:10], result["commit"][:7], "2 cores"):
        assert part in measured("latency")


def test_the_page_names_every_study_with_results_of_a_changed_tree() -> None:
    files = [path for path in RESULTS.rglob("*.json") if ".unclean" not in path.name]
    changed = {path.parent.name for path in files if re.search(r'"commit": "\w+\+"', path.read_text(encoding="utf-8"))}
    [sentence] = re.findall(r"Older ones whose commit ends with `\+` [^.]*\.", PAGE)
    assert set(re.findall(r"`(\w+)`", sentence)) == changed and len(files) > 40
