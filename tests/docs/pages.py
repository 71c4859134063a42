"""The Markdown pages of the repository, their links, anchors and code blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (?P<text>.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """One fenced block of a page."""

    page: str
    language: str
    text: str


def pages() -> list[Path]:
    """Return the pages that a reader is meant to find: those of the root, `docs`, `benchmarks`, `k8s`, `examples`."""
    folders = [ROOT / "k8s" / "README.md", ROOT / "examples" / "README.md"]
    return [*sorted(ROOT.glob("*.md")), *folders, *sorted((ROOT / "docs").rglob("*.md"))]


def prose_of(page: Path) -> str:
    """Return the page without its code blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks_of(page: Path) -> list[CodeBlock]:
    """Return the page's code blocks, in order."""
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(ROOT))
    return [CodeBlock(name, match["language"], match["text"]) for match in _FENCE.finditer(text)]


def links_of(page: Path) -> Iterator[str]:
    """Yield the targets of the page's links."""
    return (match["target"] for match in _LINK.finditer(prose_of(page)))


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that the page's headings get."""
    headings = (match["text"] for match in _HEADING.finditer(prose_of(page)))
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
