"""How the kernel is made: once, and not at all where nothing can make it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from gpu_worker.lora_kernel import LoraKernel, load_kernel


def test_it_is_compiled_once(tmp_path: Path, lora_kernel: LoraKernel) -> None:
    assert load_kernel(tmp_path) is not None
    [library] = (tmp_path / "native").glob("*.so")
    made = library.stat().st_mtime_ns
    assert load_kernel(tmp_path) is not None
    assert [(path, path.stat().st_mtime_ns) for path in (tmp_path / "native").glob("*.so")] == [(library, made)]


def test_without_a_compiler_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.INFO):
        assert load_kernel(tmp_path / "cache") is None
    assert "no C++ compiler" in caplog.text


def test_a_compiler_that_fails_is_logged_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "c++").write_text("#!/bin/sh\necho 'unknown option -march=native' >&2\nexit 1\n")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load_kernel(tmp_path / "cache") is None
    assert "unknown option" in caplog.text
    assert not list((tmp_path / "cache" / "native").glob("*.so"))
