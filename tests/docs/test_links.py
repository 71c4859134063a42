"""Every link of a page leads to a file that exists, and every anchor to a heading."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.pages import ROOT, anchors_of, links_of, pages

_OUTSIDE = ("http://", "https://", "mailto:")
_PATH = re.compile(
    r"`((?:benchmarks|deployments|docs|examples|gpu_worker|k8s|lora_store|retriever_svc|tests)/[\w./-]+)`"
)
_OURS = [page for page in pages() if page.parent == ROOT or ROOT / "docs" in page.parents]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def broken(page: Path) -> list[str]:
    """Return the page's links whose file or anchor does not exist."""
    found = []
    for target in links_of(page):
        if target.startswith(_OUTSIDE):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            found.append(target)
    return found


def test_files_that_pages_name_exist() -> None:
    named = [(page.name, path) for page in _OURS for path in _PATH.findall(page.read_text(encoding="utf-8"))]
    assert len(named) > 25
    missing = [(page, path) for page, path in named if page != "CHANGELOG.md" and not (ROOT / path).exists()]
    assert missing == []


def test_enough_links_are_looked_at() -> None:
    assert len(pages()) > 40
    assert sum(len(list(links_of(page))) for page in pages()) > 100


def test_the_site_lists_every_page() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = set(_files(config["nav"]))
    docs = ROOT / "docs"
    assert listed == {str(page.relative_to(docs)) for page in docs.rglob("*.md")}


def _files(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    items = nav.values() if isinstance(nav, dict) else nav
    return [file for item in items for file in _files(item)]


def test_the_site_asks_no_other_host() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "highlightjs: false" in config
    assert "http" not in (ROOT / "docs" / "site.css").read_text(encoding="utf-8")
