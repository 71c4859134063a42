"""Markdown of the report."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def plot(name: str, words: str) -> str:
    """Return the reference of a section in results/paper to the plot `name` there."""
    return f"![{words}]({name}.svg)\n"
