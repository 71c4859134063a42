from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu_worker.compilers import script


@pytest.fixture(autouse=True)
def quick_compiler(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile without optimizing, in a third of the time: these tests look for libraries and compute little."""
    if (compiler := shutil.which("c++")) is not None:
        folder: Path = tmp_path_factory.mktemp("quick")
        script(folder / "c++", f'exec {compiler} "$@" -O0')
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.fixture
def no_options(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The environment without a compiler of its own."""
    for name in ("CXX", "CXXFLAGS"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
