"""The report of checks at full counts: a repeated check replaces its own entry and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import soak
from tests.soak import Scale, SoakReport


def report_of(name: str, outcome: str, requests: int) -> list[str]:
    item: Any = SimpleNamespace(name=name, path=Path("tests/door/test_x.py"))
    ended: Any = SimpleNamespace(outcome=outcome, duration=1.26)
    report = SoakReport()
    report.add(item, Scale(True, {"requests": requests}), ended)
    return report.write()


def test_a_repeated_check_replaces_its_own_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "RESULTS", tmp_path)
    assert report_of("test_a", "passed", 10) == report_of("test_b", "failed", 20) == ["door.json"]
    report_of("test_b", "passed", 30)
    checks = json.loads((tmp_path / "soak" / "door.json").read_text())["checks"]
    seen = {name: (check["outcome"], check["counts"]["requests"], check["seconds"]) for name, check in checks.items()}
    assert seen == {"test_a": ("passed", 10, 1.3), "test_b": ("passed", 30, 1.3)}
    assert all(check["commit"] and check["date"] and check["machine"] for check in checks.values())
