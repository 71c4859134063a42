"""Keep words and sentence patterns that readers found hard to understand out of everything that people read.

Checked are the docstrings, comments and strings of Python files, the whole text of all other files, and the names of
tests. Every tracked text file is covered except those in EXCEPTIONS.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each pattern with the words to write instead.
BANNED: dict[str, str] = {
    r"\btold\b|\btells?\b(?! apart| me\b| whether)": "report, log, return, say",
    r"\bsigns? of life\b": "heartbeat",
    r"(?<!`)\bfigures?\b": "metric, number",
    r"\bdoors?\b": "authentication, HTTP entry point",
    r"\bmend(s|ed)?\b": "correct, fix",
    r"\bnobody\b": "no client, no tenant",
    r"\bwhoever\b": "anyone who, the client that",
    r"\bamid\b": "during",
    r"\banew\b": "again",
    r"\bbeside\b": "next to, besides",
    r"\blikeliest\b|\bcommonest\b": "most likely, most common",
    r"\bin passing\b": "on a short-lived thread",
    r"\bby half\b|\bby then\b": "partly; before that",
    r"\bhears? of\b|\bheard of\b": "get the error of, notice",
    r"\bnot to be had\b": "not available",
    r"\bnone of (these|them) is\b": "state the action",
    r"(?<!there )(?<!There )\bis no (?!longer\b|more\b|less\b)[a-z]+": "is not a",
    r"\b(lies|stands) (in|on|at|below|above|beside|behind|around|where)\b": "is",
    r"\b(it|they|this|these|that) (lies|lie|stands|stand)\b": "is",
    r"\bstands? (in for|for|behind|here|there)\b": "replaces, means, follows",
    r"\bgoes by\b|\bgo by\b": "is named by",
    r"\bwho (asks|is asked|looks)\b": "the client",
    r"\bas (was|were) asked\b": "as requested",
    r"\bextra inputs are not permitted\b": "unknown",
    r"\bsomebody\b": "another client, another tenant",
    r"\bfor ever\b": "forever, without a bound",
    r"\bmachine alone\b": "machine only",
    r"(^|[.;:] )What (exceeds|cannot|follows|answers|answered|comes|is left)\b(?![^.]*\?)": "name the subject",
}
OPENINGS = ("What ", "Who ", "Whose ", "That ", "Nobody ", "Those ", "The same ")
# A test's name is a claim with a subject.
BANNED_IN_NAMES = re.compile(
    r"^test_(what|who|whoever|whose|where|of|those)_|_(told|tells?|nobody|whoever|anew|beside)_"
)
SUFFIXES = {".py", ".js", ".html", ".css", ".md", ".yaml", ".yml", ".toml", ".cpp", ".h", ".txt", ".cff"}
NAMES = {"Makefile", "Dockerfile", "NOTICE"}
# Prefixes of paths that are not checked, each with the reason.
EXCEPTIONS = {
    "tests/test_language.py": "contains the banned words",
    "tests/retriever_svc/foreign_prompts.txt": "prompts of users, not text about the program",
    "benchmarks/results/soak/": "written by runs",
    "benchmarks/routing/pools/": "samples and prompts of users, not text about the program",
}
LEAST_FILES = 750


def text_files() -> list[Path]:
    """Return the tracked files to check."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [name for name in tracked.split("\0") if name and not name.startswith(tuple(EXCEPTIONS))]
    files = [ROOT / name for name in names]
    return sorted(file for file in files if file.is_file() and (file.suffix in SUFFIXES or file.name in NAMES))


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


def names_of_tests(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield node.lineno, node.name


def banned_in(text: str) -> list[str]:
    return [
        f"{found[0]!r}: write {better}" for word, better in BANNED.items() if (found := re.search(word, text, re.I))
    ]


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_no_banned_word_is_used() -> None:
    found = [
        f"{where(path, line)}: {problem}"
        for path in text_files()
        for line, text in texts_of(path)
        for problem in banned_in(text)
    ]
    assert not found, "\n".join(found)


def test_docstrings_do_not_open_with_a_noun_clause() -> None:
    found = [
        f"{where(path, line)}: {text.splitlines()[0]}"
        for path in text_files()
        if path.suffix == ".py"
        for line, text in docstrings_of(path)
        if text.startswith(OPENINGS)
    ]
    assert not found, "\n".join(found)


def test_names_of_tests_are_claims_with_a_subject() -> None:
    files = [path for path in text_files() if path.name.startswith("test_") and path.suffix == ".py"]
    names = [(path, line, name) for path in files for line, name in names_of_tests(path)]
    assert len(names) > 1500
    found = [f"{where(path, line)}: {name}" for path, line, name in names if BANNED_IN_NAMES.search(name)]
    assert not found, "\n".join(found)


def test_the_files_are_walked_and_the_exceptions_exist() -> None:
    assert len(text_files()) >= LEAST_FILES
    assert all((ROOT / name).exists() for name in EXCEPTIONS)


@pytest.mark.parametrize(
    "text",
    [
        "Metrics are told again.",
        "It is no folder.",
        "Whoever asks",
        "it stands in for torch",
        "the file lies below the folder",
        "written anew",
        "Live figures",
        "the door",
        "Nothing waits. What exceeds a limit is refused.",
        "somebody else may read it",
    ],
)
def test_the_banned_words_are_found(text: str) -> None:
    assert banned_in(text)


@pytest.mark.parametrize(
    "text",
    [
        "There is no adapter.",
        "It is no longer live.",
        "to tell apart",
        "Tell me about",
        "heartbeats",
        "bad",
        "besides",
        "What is left?",
    ],
)
def test_good_sentences_pass(text: str) -> None:
    assert not banned_in(text)
