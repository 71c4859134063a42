"""Every module of the benchmarks and the examples imports, and every command among them prints its help."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# They run in environments of their own.
ELSEWHERE = {
    *("benchmarks.vllm_peer", "benchmarks.cpu_peer", "benchmarks.gpu.kernels"),
    "benchmarks.routing.semantic_router_peer",
}
PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in ("benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
}
MODULES = sorted(PATHS.keys() - ELSEWHERE)
COMMANDS = [name for name in MODULES if '\nif __name__ == "__main__":' in PATHS[name].read_text(encoding="utf-8")]


def test_the_commands_are_found() -> None:
    assert {"benchmarks.throughput", "benchmarks.paper.__main__", "examples.demo"} <= set(COMMANDS)
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_a_module_imports_and_has_a_docstring(name: str) -> None:
    assert importlib.import_module(name).__doc__


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_prints_its_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, name, raising=False)  # runpy warns about modules that are imported already
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module(name, run_name="__main__")
    assert exit_.value.code == 0
    assert "Usage" in capsys.readouterr().out
