"""What recording usage costs: every event that is measured is stored, and the documentation tells the share."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from benchmarks.results_file import RESULTS
from benchmarks.usage_cost import measure
from lora_store import Location
from lora_store.usage import UsageFiles, UsageQuery

DOCS = Path(__file__).parents[2] / "docs"


def test_every_event_that_is_measured_is_stored(tmp_path: Path) -> None:
    found = measure(tmp_path, num_segments=3, per_segment=5)
    assert len(found) == 3 and all(value > 0 for run in found for value in run.values())
    days = UsageQuery(date(2026, 1, 1), datetime.now(UTC).date() + timedelta(days=1))
    [row] = UsageFiles(Location(str(tmp_path)).child("usage")).sums(days)
    assert (row["requests"], row["completion_tokens"]) == (15, 15 * 64)


def test_usage_costs_what_the_documentation_says() -> None:
    files = sorted((RESULTS / "usage_cost").glob("results*.json"))
    assert files and "less than 0.1 % of its time" in (DOCS / "how-to" / "usage.md").read_text(encoding="utf-8")
    for file in files:
        assert json.loads(file.read_text(encoding="utf-8"))["figures"]["share"] < 0.001
