"""Markdown tables, and blocks of a page that are written by a program."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

Block = Callable[[], str]
_BLOCK = re.compile(r"(<!-- generated: (?P<name>[a-z0-9-]+) -->\n)(?P<body>.*?)(<!-- end of generated -->)", re.DOTALL)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table. Line breaks of cells become spaces, and `|` is escaped."""
    lines = [_row(head), _row(["---"] * len(head)), *map(_row, rows)]
    return "\n".join(lines) + "\n"


def code(text: str) -> str:
    """Return `text` as code, and an empty text unchanged."""
    return f"`{text}`" if text else ""


def block_names(page: str) -> list[str]:
    """Return the names of a page's generated blocks, in order."""
    return [match["name"] for match in _BLOCK.finditer(page)]


def filled(page: str, blocks: Mapping[str, Block]) -> str:
    """Return the page with every generated block written again. Raises: KeyError for an unknown block."""
    return _BLOCK.sub(lambda match: match[1] + "\n" + blocks[match["name"]]() + "\n" + match[4], page)


def pages_with_blocks(folder: Path) -> list[Path]:
    """Return the Markdown files below `folder` that have generated blocks."""
    return [path for path in sorted(folder.rglob("*.md")) if block_names(path.read_text(encoding="utf-8"))]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
