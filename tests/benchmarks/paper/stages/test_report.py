"""The report: every placeholder is filled from rows, and the appendices are linked."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.paper.common.workspace import PAPER_RESULTS
from benchmarks.paper.stages import report
from benchmarks.paper.stages.answer_tables import BASELINES, ROWS, Answers
from benchmarks.paper.stages.claims import Results

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
    [title] = re.findall(r"\[([^\]]+)\]\(\S+/answers\.md\)", text)
    assert title == "Answers"
    links = re.findall(r"\[[^\]]+\]\((\S+\.md)\)", text.partition("## Appendices")[2])
    assert len(links) == len(set(links)) == 2


def test_adapters_that_gain_less_than_their_interval_are_named() -> None:
    scores = {"sure": (1.0, 0.0), "unsure": (0.5, 0.5)}  # of the own adapter and of guessing
    rows = [
        {"run": run, "task": task, "number": number, "score": score}
        for task, pair in scores.items()
        for run, score in zip(("perfect", "majority"), pair, strict=True)
        for number in range(5)
    ]
    assert report._of_little_gain(Answers(pd.DataFrame(rows), {})) == "1 of the 2 adapters (`unsure`)"


def test_the_committed_report_is_short_and_its_links_exist() -> None:
    committed = report.REPORT.read_text(encoding="utf-8")
    assert len(committed.splitlines()) <= MOST_LINES
    links = re.findall(r"\]\(([^#)]+)\)", committed)
    assert len(links) >= 14 and all((report.REPORT.parent / link).exists() for link in links)


def test_other_measurements_of_the_main_relation_are_listed(tmp_path: Path) -> None:
    assert report.repeated(Results(tmp_path)) == "not measured yet"
    runs = {"auto": ("uniform_iid_always", "selection_iid_always"), "ensemble": ("mixture_iid", "selection_iid")}
    for stage, (mixture, selection) in runs.items():
        rows = [{"run": mixture, "task": t, "number": 0, "score": 0.25} for t in "ab"]
        rows += [{"run": selection, "task": t, "number": 0, "score": 1.0} for t in "ab"]
        pd.DataFrame(rows).to_parquet(tmp_path / f"{stage}.parquet")
    found = report.repeated(Results(tmp_path))
    assert found == "`auto` -75.0 (-75.0 to -75.0); `ensemble` -75.0 (-75.0 to -75.0)"
