"""Building kernels ahead of time, in the form that a start expects."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_worker.model.lora_kernel import LoraKernel
from gpu_worker.model.packed_linear import LinearKernel, may_use_tiles
from gpu_worker.native.kernels.build_kernels import build, main, prebuilt_path
from gpu_worker.native.kernels.kernel_build import FOLDER, Compiler, KernelUnavailable, kernel_names
from gpu_worker.native.kernels.kernel_loading import check_trusted
from gpu_worker.native.kernels.kernel_variants import VARIANTS, this_processor

HERE = [variant for variant in VARIANTS if variant.machine == platform.machine()]


def test_built_kernels_are_found_at_the_start(
    tmp_path: Path, lora_kernel: LoraKernel, capsys: pytest.CaptureFixture[str]
) -> None:
    before = os.umask(0o002)
    try:
        assert main(["--out", str(tmp_path)]) == 0
    finally:
        os.umask(before)
    expected = [prebuilt_path(tmp_path, variant, name) for variant in HERE for name in kernel_names()]
    assert sorted(tmp_path.glob("*/*")) == sorted(expected)
    assert capsys.readouterr().out.split() == [str(path.relative_to(tmp_path)) for path in expected]
    for library in expected:
        assert library.read_bytes()[:4] == b"\x7fELF"
        assert library.stat().st_mode & 0o777 == 0o644, "another user runs the image"
        assert library.parent.stat().st_mode & 0o777 == 0o755, "whatever the umask"
        check_trusted(library, os.geteuid())
    for variant in this_processor().fitting():
        kernel = LinearKernel(ctypes.CDLL(str(prebuilt_path(tmp_path, variant, "packed_linear"))))
        has_tiles = variant.name.endswith("-amx")
        assert kernel.has_bf16_products == (has_tiles or variant.name.endswith("-bf16"))
        assert kernel.has_tiles == (has_tiles and may_use_tiles())


def test_the_build_needs_nothing_but_the_standard_library(tmp_path: Path) -> None:
    """The image's build stage has no packages installed."""
    listed = "[m for m in ('torch', 'numpy', 'filelock') if m in sys.modules]"
    code = f"import sys, gpu_worker.native.kernels.build_kernels; print({listed})"
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=FOLDER.parents[2], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def test_a_machine_without_variants_gets_an_error(tmp_path: Path) -> None:
    with pytest.raises(KernelUnavailable, match="'riscv64'; supported: aarch64, x86_64"):
        build(tmp_path, "riscv64", Compiler(("c++",)))


def test_without_a_compiler_the_command_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "nonesuch")
    assert main(["--out", str(tmp_path)]) == 1
    assert "nonesuch" in capsys.readouterr().err
