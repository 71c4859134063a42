"""The report: every placeholder is filled from rows, and the appendices are linked."""

from __future__ import annotations

import re
import shutil

import pytest

from benchmarks.paper.common.workspace import PAPER_RESULTS
from benchmarks.paper.stages import report
from benchmarks.paper.stages.answer_tables import BASELINES, ROWS

MOST_LINES = 250


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report over the main table alone, as after the first stages."""
    folder = tmp_path_factory.mktemp("results")
    for name in (ROWS, BASELINES):
        shutil.copy(PAPER_RESULTS / name, folder / name)
    (folder / "answers.md").write_text("## Answers\n\nall right\n")
    return report.report_of(folder, report.READING.read_text(encoding="utf-8"))


def test_no_placeholder_is_left_and_missing_rows_are_named(text: str) -> None:
    assert "$" not in text and report.CONTENTS not in text
    assert "not measured yet" in text and "Stages without results: pool, retrieval" in text
    assert "A second base model was not measured yet." in text and "another kind were not measured yet." in text


def test_the_contents_link_to_every_heading(text: str) -> None:
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    links = re.findall(r"^- \[(.+)\]\(#(.+)\)$", text, flags=re.MULTILINE)
    assert ["Contents", *[name for name, _ in links]] == headings and len(headings) >= 8
    assert links[0] == ("1. Claims of the paper", "1-claims-of-the-paper")


def test_the_existing_appendices_are_linked_by_their_titles(text: str) -> None:
    [line] = re.findall(r"^- \[.+\]\(.+answers\.md\)$", text, flags=re.MULTILINE)
    assert line.startswith("- [Answers](")


def test_the_committed_report_is_short_and_its_links_exist() -> None:
    committed = report.REPORT.read_text(encoding="utf-8")
    assert len(committed.splitlines()) <= MOST_LINES
    links = re.findall(r"\]\(([^#)]+)\)", committed)
    assert len(links) >= 14 and all((report.REPORT.parent / link).exists() for link in links)


def test_every_better_method_has_a_file() -> None:
    root = report.REPORT.parents[2]
    assert len(report.BETTER) >= 8 and all((root / method.file).exists() for method in report.BETTER)
