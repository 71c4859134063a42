from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.routing.older_tree import OlderTree

POOL_SCALE = """
SIBLING_COSINE, TOP_K = 0.5, 3

class Data:
    encoder = None
    load = classmethod(lambda cls: cls())
    def records(self, count, sibling_cosine):
        return [count, sibling_cosine]
    def queries(self, count):
        import numpy as np
        return np.arange(2 * count, dtype=float).reshape(count, 2)

class Rebuilds:
    def run(self):
        print("the index is built")

def Source(records):
    return records
"""
RETRIEVER = """
import time

class LivePool:
    def __init__(self, load, source, background):
        assert source == [7, 0.5]
        self.current = self
    def nearest(self, vectors, top_k, tenant):
        assert (vectors.shape, top_k, tenant) == ((1, 2), 3, "local")
        time.sleep(vectors[0, 0] / 1000)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with an environment, and only what is imported for searches: query n takes 2 n milliseconds."""
    for path, text in (("benchmarks/pool_scale.py", POOL_SCALE), ("retriever_svc/__init__.py", RETRIEVER)):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(text)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return tmp_path


def test_an_older_tree_times_the_queries_of_each_turn(tree: Path) -> None:
    with OlderTree(tree, "search", "7", "20") as older:
        assert older.result() == []  # its pool is built
        first, second = older.result("0 2"), older.result("18 20")
    assert [len(first), len(second)] == [2, 2]
    assert min(second) >= 0.036


def test_a_tree_that_fails_ends_the_measurement(tree: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(SystemExit, match="ended without a result: exit status 1"),
        OlderTree(tree, "search", "8", "1") as older,
    ):
        older.result()
    assert "AssertionError" in capfd.readouterr().err
