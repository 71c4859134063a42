"""REPORT.md: the sections that were measured, in one file, after the reading of them."""

from __future__ import annotations

from pathlib import Path

from benchmarks.results_file import RESULTS

REPORT = Path(__file__).with_name("REPORT.md")
READING = Path(__file__).with_name("reading.md")
SECTIONS = (
    "paper_pool.md",
    "retrieval.md",
    "paper_answers.md",
    "paper_ablations.md",
    "paper_shares.md",
    "paper_speed.md",
    "paper_conflicts.md",
    "paper_gate.md",
    "paper_kinds.md",
    "paper_mixed_pool.md",
    "paper_arrivals.md",
    "paper_served_study.md",
    "paper_served_starter.md",
)


def report_of(folder: Path, reading: str) -> str:
    """The reading, written by hand, then what is there of the sections; said of the others is that they are missing."""
    found = [folder / name for name in SECTIONS if (folder / name).exists()]
    missing = [name.removesuffix(".md") for name in SECTIONS if not (folder / name).exists()]
    parts = [reading.rstrip(), *[path.read_text(encoding="utf-8").rstrip() for path in found]]
    parts += [f"Not measured yet: {', '.join(missing)}."] if missing else []
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the report."""
    REPORT.write_text(report_of(RESULTS, READING.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
