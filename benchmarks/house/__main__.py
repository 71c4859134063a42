"""Measure the source files and the six walks, and compare them with an earlier commit: `python -m benchmarks.house`.

Writes `current.json` and `house.md` to `benchmarks/results/house`; the earlier results are in `9813db0.json` there.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

import deployments
from benchmarks.house.recorder import Recorder, Walk
from benchmarks.house.sources import MAX_FILE_LINES, MAX_FUNCTION_LINES, SMALL_LINES, measure

ROOT = Path(deployments.__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "house"
BEFORE = "9813db0"

Measures = dict[str, Any]  # JSON: {"sources": …, "walks": {name: {"files", "stays", "returns"}}}
_NOTE = f"""\
Made by `python -m benchmarks.house`. A walk counts the files of `deployments` whose functions run. A stay is a group of
consecutive functions of one file, each counted where it is entered for the first time; a return is a stay in a file
that was left before. Both commits were traced in the same way: the four deployments run in one process over a tiny
model, and calls through handles, threads and middleware are followed. A test belongs to a source file if it is named
after it, with an aspect added or not, and if its folder is that of the source or one above it; tests in a folder
`whole` are of a whole package, and those in a folder `conformance` of all implementations of an interface. Small files
have fewer than {SMALL_LINES} lines.
"""


def main() -> None:
    """Measure this checkout, print the tables and write them to benchmarks/results/house."""
    logging.disable(logging.WARNING)
    before: Measures = json.loads((RESULTS / f"{BEFORE}.json").read_text())
    now = {"sources": asdict(measure(ROOT)), "walks": traced_walks()}
    (RESULTS / "current.json").write_text(json.dumps(now, indent=1) + "\n")
    table = comparison(before, now)
    (RESULTS / "house.md").write_text(f"# Structure of the code, before and after\n\n{_NOTE}\n{table}")
    print(table)


def traced_walks() -> dict[str, dict[str, int]]:
    """Record every walk of this checkout."""
    recorder = Recorder(ROOT / "deployments")  # before the application starts its threads
    from benchmarks.house.walks import all_walks

    try:
        with tempfile.TemporaryDirectory() as folder:
            return {name: _counts(walk) for name, walk in all_walks(recorder, Path(folder)).items()}
    finally:
        recorder.close()


def _counts(walk: Walk) -> dict[str, int]:
    return {"files": walk.num_files, "stays": len(walk.stays), "returns": walk.num_returns}


def _spread(sources: Measures) -> str:
    return " / ".join(str(sources["functions"][key]) for key in ("median", "p90", "largest"))


def _listed(sources: Measures, key: str) -> str:
    """Return the count and the names; "" for a checkout that was measured before this was counted."""
    found = sources.get(key)
    return "" if found is None else ", ".join([str(len(found)), *found])


ROWS: dict[str, Callable[[Measures], object]] = {
    "source files in the four packages": lambda sources: sources["num_sources"],
    "folders of `deployments`": lambda sources: len(sources["folders"]),
    "files in its largest folder": lambda sources: max(sources["folders"].values()),
    "imports of its largest importer": lambda sources: f"{sources['largest_imports']} ({sources['largest_importer']})",
    "`Any` in `deployments`": lambda sources: sources["num_any"],
    "small files in `deployments`": lambda sources: sources["num_small_files"],
    f"files of more than {MAX_FILE_LINES} lines, tests included": lambda sources: _listed(sources, "long_files"),
    f"functions of more than {MAX_FUNCTION_LINES} lines": lambda sources: _listed(sources, "long_functions"),
    "lines of a function: median / p90 / largest": _spread,
    "test files named after no source file": lambda sources: len(sources["tests_without_source"]),
    "source files without a test of their name": lambda sources: len(sources["sources_without_test"]),
}


def comparison(before: Measures, now: Measures) -> str:
    """Return markdown tables of both."""
    lines = [f"| measure | {BEFORE} | now |", "|---|---|---|"]
    lines += [f"| {label} | {of(before['sources'])} | {of(now['sources'])} |" for label, of in ROWS.items()]
    lines += ["", f"| walk: files / stays / returns | {BEFORE} | now |", "|---|---|---|"]
    for name, after in now["walks"].items():
        cells = [" / ".join(map(str, counts.values())) for counts in (before["walks"][name], after)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| folder | files now |", "|---|---|"]
    lines += [f"| `{folder}` | {number} |" for folder, number in now["sources"]["folders"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
