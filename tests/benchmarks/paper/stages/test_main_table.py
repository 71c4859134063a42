"""The quick run of the main table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import results_file
from benchmarks.paper.answering.runs import Bench
from benchmarks.paper.stages.main_table import show


def test_a_small_pool_prints_every_method_and_writes_no_results(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    out = Console(record=True, width=120)
    for _ in range(2):
        before = bench.asker.engine.counters.num_requests
        show(replace(bench, out=out), 2)
    assert bench.asker.engine.counters.num_requests == before
    text = out.export_text()
    assert "perfect         100.0" in text and "mixture iid - selection iid" in text and "majority" in text
    assert not list(tmp_path.iterdir())
