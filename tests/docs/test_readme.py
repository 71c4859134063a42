"""README is short, and leads to the pages."""

from __future__ import annotations

from tests.docs.pages import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_has_at_most_120_lines() -> None:
    assert len(README.splitlines()) <= 120


def test_readme_says_where_the_command_is_and_what_was_never_run() -> None:
    for fact in (".venv/bin/activate", "description.txt", "accepts_base", "4-bit file", "never been run on a GPU"):
        assert fact in README, fact
