"""Two sizes of one test: small counts in `make test`, the full ones in `make soak`, which keeps a report of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results_file import RESULTS, commit, machine

_REPORT = pytest.StashKey["SoakReport"]()


@dataclass
class Scale:
    """How much a test does. What it was given is in the report beside its outcome."""

    is_full: bool
    counts: dict[str, int] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)

    def pick(self, what: str, *, small: int, full: int) -> int:
        """How many of `what`."""
        self.counts[what] = full if self.is_full else small
        return self.counts[what]

    def record(self, what: str, value: float) -> None:
        """Keep what the test saw for the report, whether or not it passes."""
        self.measured[what] = round(value, 2)


def _area(path: Path) -> str:
    """Return the folder of `tests` that has the file, in whichever room of it."""
    parts = path.parts
    return parts[len(parts) - parts[::-1].index("tests")]


@dataclass
class SoakReport:
    """One check a test: its counts, outcome and seconds, by the folder of `tests` that has its file."""

    checks: defaultdict[str, dict[str, dict[str, Any]]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, item: pytest.Item, scale: Scale, report: pytest.TestReport) -> None:
        check = {"outcome": report.outcome, "seconds": round(report.duration, 1), "counts": dict(scale.counts)}
        if scale.measured:
            check["measured"] = dict(scale.measured)
        self.checks[_area(item.path)][item.name] = check

    def write(self) -> list[str]:
        """What was checked now takes the place of what was written of it before; other checks stay."""
        folder = RESULTS / "soak"
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        head = {"machine": machine(), "command": "make soak"}
        now = {"commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
        for area, checks in self.checks.items():
            path = folder / f"{area}.json"
            before = json.loads(path.read_text(encoding="utf-8"))["checks"] if path.exists() else {}
            found = before | {name: check | now for name, check in checks.items()}
            path.write_text(json.dumps({**head, "checks": found}, indent=1) + "\n", encoding="utf-8")
            written.append(path.name)
        return written


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--scale", choices=("small", "full"), default="small", help="full: the counts of `make soak`")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--scale") == "full":
        config.stash[_REPORT] = SoakReport()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """At full scale only the tests that have one run."""
    if config.getoption("--scale") == "full":
        config.hook.pytest_deselected(items=[item for item in items if "scale" not in item.fixturenames])
        items[:] = [item for item in items if "scale" in item.fixturenames]


@pytest.fixture
def scale(request: pytest.FixtureRequest) -> Scale:
    """The size this run has."""
    return Scale(request.config.getoption("--scale") == "full")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: pytest.TestReport = yield
    soak = item.config.stash.get(_REPORT, None)
    sized = getattr(item, "funcargs", {}).get("scale")
    if soak is not None and sized is not None and (report.when == "call" or report.failed):
        soak.add(item, sized, report)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    soak = session.config.stash.get(_REPORT, None)
    if soak is not None and soak.checks:
        print("\nwritten:", ", ".join(soak.write()))
