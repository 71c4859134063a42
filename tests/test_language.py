"""Keep words out of the texts that people read, because they made earlier versions hard to understand.

Checked are the docstrings, comments and strings of Python files, and the whole text of all other files. A word that
is right in some place goes into a list of the folder's own, not out of the list of all.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What to write instead stands behind each.
BANNED: dict[str, str] = {
    r"\btold\b|\btells?\b(?! apart)": "report, log, return, say",
    r"\bsigns? of life\b": "heartbeat",
    r"(?<!`)\bfigures?\b": "metric, number",
    r"\bdoors?\b": "authentication, HTTP entry point",
    r"\bmend(s|ed)?\b": "correct, fix",
    r"\bnobody\b": "no client, no tenant",
    r"\bwhoever\b": "anyone who, the client that",
    r"\bamid\b": "during",
    r"\blikeliest\b": "most likely",
    r"\bin passing\b": "on a short-lived thread",
    r"\bby half\b|\bby then\b": "partly; before that",
    r"\bnone of (these|them) is\b": "state the action",
    r"(?<!there )(?<!There )\bis no (?!longer\b|more\b|less\b)[a-z]+": "is not a",
    r"\b(it|they|this|these|that) (lies|lie|stands|stand)\b": "is",
    r"\bstands? (in for|for|behind|beside|here|there)\b": "replaces, means, follows",
    r"\bgoes by\b|\bgo by\b": "is named by",
    r"\bwho (asks|is asked|looks)\b": "the client",
    r"\bas (was|were) asked\b": "as requested",
    r"\bextra inputs are not permitted\b": "unknown",
}
OPENINGS = ("What ", "Who ", "Whose ", "That ", "Nobody ", "Those ", "The same ")
# Folders and files that are clean. Extend the list; never shorten it.
COVERED = (
    "benchmarks",
    "deployments",
    "k8s",
    "tests/benchmarks",
)
LEAST_FILES = 200
TEXT_SUFFIXES = {".js", ".html", ".css", ".md", ".yaml", ".yml"}


def covered_files() -> list[Path]:
    files: set[Path] = set()
    for name in COVERED:
        path = ROOT / name
        assert path.exists(), f"{name} is listed but missing"
        files |= {path} if path.is_file() else {file for file in path.rglob("*") if file.is_file()}
    return sorted(file for file in files if file.suffix in {".py", *TEXT_SUFFIXES})


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of everything in the file that a person reads as prose."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(source.splitlines(), start=1)
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def docstrings_of(path: Path) -> Iterator[tuple[int, str]]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)) is not None:
            yield getattr(node, "lineno", 1), text


def banned_in(text: str) -> list[str]:
    return [
        f"{found[0]!r}: write {better}" for word, better in BANNED.items() if (found := re.search(word, text, re.I))
    ]


@pytest.mark.parametrize("name", COVERED)
def test_no_banned_word_is_used(name: str) -> None:
    files = [path for path in covered_files() if path.is_relative_to(ROOT / name)]
    assert files
    found = [
        f"{path.relative_to(ROOT)}:{line}: {problem}"
        for path in files
        for line, text in texts_of(path)
        for problem in banned_in(text)
    ]
    assert not found, "\n".join(found)


def test_docstrings_do_not_open_with_a_noun_clause() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in covered_files()
        if path.suffix == ".py"
        for line, text in docstrings_of(path)
        if text.startswith(OPENINGS)
    ]
    assert not found, "\n".join(found)


def test_the_files_are_walked() -> None:
    assert len(covered_files()) >= LEAST_FILES


@pytest.mark.parametrize(
    "text",
    [
        "Metrics are told again.",
        "It is no folder.",
        "Whoever asks",
        "it stands in for torch",
        "Live figures",
        "the door",
    ],
)
def test_the_banned_words_are_found(text: str) -> None:
    assert banned_in(text)


@pytest.mark.parametrize(
    "text", ["There is no adapter.", "It is no longer live.", "to tell apart", "heartbeats", "bad"]
)
def test_good_sentences_pass(text: str) -> None:
    assert not banned_in(text)
