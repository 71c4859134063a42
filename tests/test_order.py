"""Tests that start clusters of their own run before those that share one application."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.cluster.conftest import pytest_collection_modifyitems

TESTS = Path(__file__).parent


def test_tests_with_a_cluster_of_their_own_run_first() -> None:
    files = [TESTS / folder / name for folder in ("e2e", "cluster", "docs") for name in ("test_a.py", "test_b.py")]
    items: list[Any] = [SimpleNamespace(path=file) for file in files]
    pytest_collection_modifyitems(items)
    assert [item.path for item in items] == [*files[2:4], *files[:2], *files[4:]]
