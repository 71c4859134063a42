"""Every link of a page leads to a file that exists, and every anchor to a heading."""

from __future__ import annotations

import pytest
import yaml

from tests.docs.pages import ROOT, anchors_of, links_of, pages

_OUTSIDE = ("http://", "https://", "mailto:")


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: object) -> None:
    assert broken(page) == []


def broken(page: object) -> list[str]:
    """Return the page's links whose file or anchor does not exist."""
    found = []
    for target in links_of(page):  # type: ignore[arg-type]
        if target.startswith(_OUTSIDE):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page  # type: ignore[attr-defined]
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            found.append(target)
    return found


def test_enough_links_are_looked_at() -> None:
    assert len(pages()) > 40
    assert sum(len(list(links_of(page))) for page in pages()) > 150


def test_the_site_lists_every_page() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = set(_files(config["nav"]))
    docs = ROOT / "docs"
    assert listed == {str(page.relative_to(docs)) for page in docs.rglob("*.md")}


def _files(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    items = nav.values() if isinstance(nav, dict) else nav
    return [file for item in items for file in _files(item)]  # type: ignore[attr-defined]


def test_the_site_asks_no_other_host() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "highlightjs: false" in config
    assert "http" not in (ROOT / "docs" / "site.css").read_text(encoding="utf-8")
