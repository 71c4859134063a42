"""Write REPORT.md: the reading of the results, then every measured section."""

from __future__ import annotations

from pathlib import Path

import typer

from benchmarks.paper.common.workspace import PAPER_RESULTS

_PAPER = Path(__file__).parents[1]
REPORT = _PAPER / "REPORT.md"
READING = _PAPER / "reading.md"
SECTIONS = (
    "pool.md",
    "retrieval.md",
    "answers.md",
    "ablations.md",
    "shares.md",
    "speed.md",
    "auto.md",
    "conflicts.md",
    "competence.md",
    "gate.md",
    "kinds.md",
    "mixed_pool.md",
    "arrivals.md",
    "served_study.md",
    "served_starter.md",
)


def report_of(folder: Path, reading: str) -> str:
    """Return the handwritten reading, the existing sections, and the names of the missing ones."""
    found = [folder / name for name in SECTIONS if (folder / name).exists()]
    missing = [name.removesuffix(".md") for name in SECTIONS if not (folder / name).exists()]
    parts = [reading.rstrip(), *[path.read_text(encoding="utf-8").rstrip() for path in found]]
    parts += [f"Not measured yet: {', '.join(missing)}."] if missing else []
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the report."""
    REPORT.write_text(report_of(PAPER_RESULTS, READING.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
