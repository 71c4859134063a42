"""Every measurement can still be started: what it imports is there."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"benchmarks.vllm_peer"}  # runs in vLLM's own environment
FILES = [path for path in (ROOT / "benchmarks").rglob("*.py") if path.name != "__main__.py"]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES} - ELSEWHERE


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_measurement_imports(name: str) -> None:
    assert importlib.import_module(name).__doc__
