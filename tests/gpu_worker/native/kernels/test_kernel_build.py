"""The search for a compiler, its call, and the names of its libraries."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from gpu_worker.native.kernels.kernel_build import Compiler, KernelUnavailable, name_library
from tests.gpu_worker.compilers import script


def test_the_compiler_of_the_environment_is_used(tmp_path: Path, no_options: pytest.MonkeyPatch) -> None:
    compiler = script(tmp_path / "my c++", "exit 0")
    assert Compiler.find({"CXX": f"'{compiler}' -B /x", "CXXFLAGS": "-g -O1", "PATH": ""}) == Compiler(
        (str(compiler), "-B", "/x"), ("-g", "-O1")
    )
    with pytest.raises(KernelUnavailable, match=r"no C\+\+ compiler found \(nonesuch\)"):
        Compiler.find({"CXX": "nonesuch", "PATH": os.environ["PATH"]})


def test_a_compiler_that_hangs_is_ended(tmp_path: Path) -> None:
    compiler = Compiler((str(script(tmp_path / "c++", "exec sleep 600")),))
    began = time.monotonic()
    with pytest.raises(KernelUnavailable, match=r"did not finish within 0\.2 s"):
        compiler.compile(name_library("fused"), (), tmp_path / "fused.so", limit_s=0.2)
    assert time.monotonic() - began < 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c++"]


def test_a_failing_compiler_leaves_nothing_and_its_output_is_in_the_error(tmp_path: Path) -> None:
    compiler = Compiler((str(script(tmp_path / "c++", 'echo "unknown option" >&2; exit 1')), "-B"), ("-g",))
    with pytest.raises(KernelUnavailable, match=r"c\+\+ -B -g -O3 .* failed: unknown option"):
        compiler.compile(name_library("fused"), (), tmp_path / "fused.so")
    assert [path.name for path in tmp_path.iterdir()] == ["c++"]


def test_the_first_compiler_on_the_path_is_used(tmp_path: Path) -> None:
    """`c++` may be clang, whose OpenMP calls functions that torch's runtime does not have."""
    for name in ("clang++", "g++", "c++"):
        script(tmp_path / name, "exit 0")
    for name in ("g++", "c++"):
        assert Compiler.find({"PATH": str(tmp_path)}) == Compiler((str(tmp_path / name),))
        (tmp_path / name).unlink()
    with pytest.raises(KernelUnavailable, match=r"no C\+\+ compiler found \(g\+\+, c\+\+\)"):
        Compiler.find({"PATH": str(tmp_path)})


def test_a_library_can_be_read_by_all_and_written_by_its_owner(tmp_path: Path) -> None:
    """The compiler's own umask may differ."""
    made = 'for last; do :; done; echo library > "$last"; chmod 600 "$last"'
    Compiler((str(script(tmp_path / "c++", made)),)).compile(name_library("fused"), (), tmp_path / "fused.so")
    assert (tmp_path / "fused.so").read_text() == "library\n"
    assert (tmp_path / "fused.so").stat().st_mode & 0o777 == 0o644


def test_a_library_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a power failure could leave a file without its end, which each start would compile again."""
    library, flushed, flush = tmp_path / "fused.so", list[tuple[bool, bool]](), os.fsync

    def record(descriptor: int) -> None:
        flushed.append((library.exists(), stat.S_ISDIR(os.fstat(descriptor).st_mode)))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    made = 'for last; do :; done; echo library > "$last"'
    Compiler((str(script(tmp_path / "c++", made)),)).compile(name_library("fused"), (), library)
    assert flushed == [(False, False), (True, True)], "the file, and then the folder"
