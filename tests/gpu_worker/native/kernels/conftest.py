from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gpu_worker.compilers import path_with_quick_compiler


@pytest.fixture(autouse=True)
def quick_compiler(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests look for libraries and compute little."""
    monkeypatch.setenv("PATH", path_with_quick_compiler(tmp_path_factory.mktemp("quick")))


@pytest.fixture
def no_options(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Remove the environment's own compiler."""
    for name in ("CXX", "CXXFLAGS"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
