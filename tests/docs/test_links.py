"""Every link of a page leads to a file that exists, and every anchor to a heading."""

from __future__ import annotations

import re
from typing import Any

import yaml

from tests.docs.pages import ROOT, anchors_of, links_of, pages

_OUTSIDE = ("http://", "https://", "mailto:")
_PATH = re.compile(
    r"`((?:benchmarks|deployments|docs|examples|gpu_worker|k8s|lora_store|retriever_svc|tests)/[\w./-]+)`"
)
_OURS = [page for page in pages() if page.parent == ROOT or ROOT / "docs" in page.parents]


def test_links_lead_to_files_and_headings_that_exist() -> None:
    links = [(page, target) for page in pages() for target in links_of(page) if not target.startswith(_OUTSIDE)]
    assert len(pages()) > 40 and len(links) > 100
    broken = []
    for page, target in links:
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            broken.append((str(page.relative_to(ROOT)), target))
    assert broken == []


def test_files_that_pages_name_exist() -> None:
    named = [(page.name, path) for page in _OURS for path in _PATH.findall(page.read_text(encoding="utf-8"))]
    assert len(named) > 25
    missing = [(page, path) for page, path in named if page != "CHANGELOG.md" and not (ROOT / path).exists()]
    assert missing == []


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


def test_readme_is_short_and_says_where_the_command_is_and_what_was_never_run() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 120
    for fact in (".venv/bin/activate", "description.txt", "accepts_base", "4-bit file", "never been run on a GPU"):
        assert fact in readme, fact


def test_the_site_asks_no_other_host() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "highlightjs: false" in config
    assert "http" not in (ROOT / "docs" / "site.css").read_text(encoding="utf-8")
