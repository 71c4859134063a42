"""Two sizes of one test: small counts in `make test`, full counts in `make soak`, which also writes a report."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import is_hypothesis_test

from benchmarks.results_file import RESULTS, UNCLEAN, commit, machine

_REPORT = pytest.StashKey["SoakReport"]()


@dataclass
class Scale:
    """The size of a test. The arguments appear in the report with the outcome."""

    is_full: bool
    counts: dict[str, int] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)

    def pick(self, what: str, *, small: int, full: int) -> int:
        """Return how many of `what` to use."""
        self.counts[what] = full if self.is_full else small
        return self.counts[what]

    def record(self, what: str, value: float) -> None:
        """Keep an observation for the report, whether or not the test passes."""
        self.measured[what] = round(value, 2)


def _area(path: Path) -> str:
    """Return the folder of `tests` that contains the file, at any depth."""
    parts = path.parts
    return parts[len(parts) - parts[::-1].index("tests")]


@dataclass
class SoakReport:
    """One check per test: its counts, outcome and seconds, by the folder of `tests` that contains the file."""

    checks: defaultdict[str, dict[str, dict[str, Any]]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, item: pytest.Item, scale: Scale, report: pytest.TestReport) -> None:
        check = {"outcome": report.outcome, "seconds": round(report.duration, 1), "counts": dict(scale.counts)}
        if scale.measured:
            check["measured"] = dict(scale.measured)
        self.checks[_area(item.path)][item.name] = check

    def write(self) -> list[str]:
        """Replace the entries of the tests that ran; keep the others.

        Results of a tree with local changes go into files next to these, which git ignores.
        """
        folder = RESULTS / "soak"
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        date = datetime.now(UTC).isoformat(timespec="seconds")
        now = {"commit": commit(), "date": date, "machine": machine()}
        suffix = UNCLEAN if now["commit"].endswith("+") else ""
        for area, checks in self.checks.items():
            path = folder / f"{area}{suffix}.json"
            before = json.loads(path.read_text(encoding="utf-8"))["checks"] if path.exists() else {}
            found = before | {name: check | now for name, check in checks.items()}
            path.write_text(json.dumps({"command": "make soak", "checks": found}, indent=1) + "\n", encoding="utf-8")
            written.append(path.name)
        return written


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--scale", choices=("small", "full"), default="small", help="full: the counts of `make soak`")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--scale") == "full":
        config.stash[_REPORT] = SoakReport()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """At full scale run only the tests that have full counts, and those with generated examples, with more of them."""
    if config.getoption("--scale") == "full":
        hypothesis.settings.load_profile("full")
        kept = [
            item for item in items if "scale" in item.fixturenames or is_hypothesis_test(getattr(item, "obj", None))
        ]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.fixture
def scale(request: pytest.FixtureRequest) -> Scale:
    """Return the size of this run."""
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
