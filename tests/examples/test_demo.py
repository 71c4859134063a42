"""The demo prints its tables whatever becomes of the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import results_file
from benchmarks.results_file import TreeChanged
from benchmarks.starter_pool import HELD_OUT, read_prompts
from examples.demo import SETTINGS, Reply, report, write


def answered() -> dict[str, list[Reply]]:
    """Return replies of every setting: all right with the own adapter, all wrong without one."""
    replies = {}
    for name in SETTINGS:
        lora: dict[str, Any] = {"adapters": [], "candidates": [], "abstained": name == "base"}
        replies[name] = [
            Reply(question, "" if name == "base" else question.output, lora, 0.5)
            for question in read_prompts(HELD_OUT, 1)
        ]
    return replies


def test_a_changed_tree_loses_only_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    monkeypatch.setattr(results_file, "commit", lambda: "0123456789ab+")
    replies = answered()
    report(Console(width=160), replies)
    shown = capsys.readouterr().out
    assert "share right" in shown and "model: auto" in shown
    assert shown.endswith("hit@1=0.000 hit@3=0.000 auto_right=1.000 own_right=1.000 base_right=0.000\n")
    with pytest.raises(TreeChanged):
        write(replies)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        "results.unclean.json",
        "table.unclean.txt",
    }
