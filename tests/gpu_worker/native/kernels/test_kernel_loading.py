"""Compiled kernels are found, built and loaded, and the worker runs without them."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from pathlib import Path
from threading import Barrier

import pytest
from threadpoolctl import threadpool_info

from gpu_worker.config import WorkerConfig
from gpu_worker.model.lora_kernel import LoraKernel
from gpu_worker.native.kernels import kernel_loading
from gpu_worker.native.kernels.build_kernels import prebuilt_path
from gpu_worker.native.kernels.kernel_build import Compiler, KernelUnavailable, kernel_names
from gpu_worker.native.kernels.kernel_loading import check_trusted, load_library, num_missing_kernels
from gpu_worker.native.kernels.kernel_variants import VARIANTS, this_processor
from gpu_worker.native.loop import Engine
from tests.gpu_worker.compilers import script
from tests.gpu_worker.engine_driver import greedy, run_together
from tests.tiny import InlineExecutor, tiny_config

ME = os.geteuid()


@pytest.fixture(autouse=True)
def small_source(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile a function instead of a kernel: these tests look for libraries, and do not call them."""
    source = tmp_path_factory.mktemp("small") / "small.cpp"
    source.write_text('extern "C" int small() { return 1; }\n')
    monkeypatch.setattr(kernel_loading, "name_library", lambda name: source)


def load(cache: Path) -> ctypes.CDLL | None:
    """Load a kernel as another process does."""
    load_library.cache_clear()
    return load_library("grouped_lora", cache)


def libraries(cache: Path) -> list[Path]:
    return sorted((cache / "native").glob("*.so"))


def test_a_kernel_is_compiled_once(tmp_path: Path, lora_kernel: LoraKernel) -> None:
    assert load(tmp_path) is not None
    [library] = libraries(tmp_path)
    made = library.stat().st_mtime_ns
    assert load(tmp_path) is not None
    assert [(path, path.stat().st_mtime_ns) for path in libraries(tmp_path)] == [(library, made)]


def test_a_compiled_kernel_needs_neither_compiler_nor_writable_folder(
    tmp_path: Path, no_options: pytest.MonkeyPatch, lora_kernel: LoraKernel, caplog: pytest.LogCaptureFixture
) -> None:
    assert load(tmp_path) is not None
    [library] = libraries(tmp_path)
    library.with_suffix(".lock").unlink(missing_ok=True)
    library.parent.chmod(0o555)
    no_options.setenv("PATH", "")
    try:
        assert load(tmp_path) is not None
    finally:
        library.parent.chmod(0o755)
    assert list(library.parent.iterdir()) == [library], "no lock was taken"
    assert caplog.records == []


@pytest.mark.parametrize("variable", ["CXX", "CXXFLAGS"])
def test_another_compiler_or_other_options_compile_again(
    variable: str, tmp_path: Path, no_options: pytest.MonkeyPatch, lora_kernel: LoraKernel
) -> None:
    assert load(tmp_path) is not None
    no_options.setenv(variable, {"CXX": Compiler.find().command[0], "CXXFLAGS": "-g"}[variable])
    assert load(tmp_path) is not None
    assert len(libraries(tmp_path)) == 2


@pytest.mark.parametrize("compiler", [None, 'for last; do :; done; echo "not a library" > "$last"'])
def test_without_a_compiler_or_with_a_library_that_cannot_be_loaded_there_is_no_kernel(
    compiler: str | None, tmp_path: Path, no_options: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A library cannot be loaded from a file system that is mounted without execution."""
    if compiler is not None:
        no_options.setenv("CXX", str(script(tmp_path / "c++", compiler)))
    else:
        no_options.setenv("PATH", str(tmp_path))
    assert load(tmp_path / "cache") is None
    assert len(libraries(tmp_path / "cache")) == (compiler is not None)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "grouped_lora is disabled" in record.getMessage()
    assert ("no C++ compiler" in record.getMessage()) == (compiler is None)


def test_an_unusable_cache_folder_disables_only_the_kernels(
    tmp_path: Path, tiny_folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    config = tiny_config(tiny_folders["llama"], cache_dir=tmp_path / "file" / "cache")
    engine = Engine(config, lambda digest: pytest.fail("nothing is fetched"), executor=InlineExecutor())
    [answer] = run_together(engine, [greedy("hello")])
    assert len(answer.tokens) == 8
    assert "grouped_lora is disabled" in caplog.text


def test_missing_kernels_are_counted(tmp_path: Path, no_options: pytest.MonkeyPatch) -> None:
    no_options.setenv("PATH", "")
    assert num_missing_kernels(WorkerConfig(cache_dir=tmp_path)) == len(kernel_names()) > 2
    assert num_missing_kernels(WorkerConfig(cache_dir=tmp_path, device="cuda")) == 0


def test_kernels_are_compiled_on_all_threads_of_a_worker(tmp_path: Path, no_options: pytest.MonkeyPatch) -> None:
    both = Barrier(2, timeout=60)
    no_options.setattr(kernel_loading, "kernel_names", lambda: ["fused", "sampling"])
    no_options.setattr(Compiler, "compile", lambda *_, **__: both.wait())
    no_options.setattr(kernel_loading, "_open", lambda library: library)
    assert num_missing_kernels(WorkerConfig(cache_dir=tmp_path, num_threads=2)) == 0


def test_a_new_folder_is_accessible_to_this_user_only(tmp_path: Path, lora_kernel: LoraKernel) -> None:
    load(tmp_path / "new")
    assert (tmp_path / "new" / "native").stat().st_mode & 0o777 == 0o700
    (tmp_path / "shared" / "native").mkdir(parents=True)
    (tmp_path / "shared" / "native").chmod(0o777)
    assert load(tmp_path / "shared") is not None
    assert (tmp_path / "shared" / "native").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o664, 0o646], ids=oct)
def test_a_library_that_others_can_write_is_not_loaded_but_compiled_again(
    mode: int,
    tmp_path: Path,
    no_options: pytest.MonkeyPatch,
    lora_kernel: LoraKernel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    load(tmp_path)
    [library] = libraries(tmp_path)
    library.unlink()  # the loaded file does not change
    library.write_bytes(b"code of another user")
    library.chmod(mode)
    with no_options.context() as without_compiler:
        without_compiler.setenv("PATH", "")
        assert load(tmp_path) is None
    assert "is writable by other users" in caplog.text and "no C++ compiler" in caplog.text
    assert load(tmp_path) is not None
    assert libraries(tmp_path) == [library]
    assert library.stat().st_mode & 0o777 == 0o644 and library.read_bytes()[:4] == b"\x7fELF"


def test_a_folder_that_others_can_write_is_not_trusted(tmp_path: Path) -> None:
    library = tmp_path / "x.so"
    library.touch(mode=0o600)
    check_trusted(library, ME)
    tmp_path.chmod(0o777)
    with pytest.raises(KernelUnavailable, match="is writable by other users"):
        check_trusted(library, ME)


@pytest.mark.skipif(ME != 0, reason="only root can give a file to another user")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_files_of_another_user_are_not_trusted(what: str, tmp_path: Path) -> None:
    library = tmp_path / "x.so"
    library.touch(mode=0o600)
    os.chown(library if what == "file" else tmp_path, 4711, -1)
    with pytest.raises(KernelUnavailable, match="is owned by user 4711"):
        check_trusted(library, ME)


@pytest.mark.parametrize("folder", ["cache", 300 * "c"], ids=["missing", "unusable"])
def test_a_prebuilt_kernel_is_used_and_nothing_is_compiled(
    folder: str, tmp_path: Path, no_options: pytest.MonkeyPatch, lora_kernel: LoraKernel
) -> None:
    """Also if the system refuses to look into the cache folder: here its name is too long."""
    fitting = this_processor().fitting()
    if not fitting:
        pytest.skip("no variant is for this processor")
    library = prebuilt_path(tmp_path / "prebuilt", fitting[-1], "grouped_lora")
    library.parent.mkdir(parents=True)
    Compiler.find().compile(kernel_loading.name_library("grouped_lora"), fitting[-1].options, library)
    no_options.setattr(kernel_loading, "PREBUILT", tmp_path / "prebuilt")
    no_options.setenv("PATH", "")
    assert load_library("grouped_lora", tmp_path / folder) is not None
    assert not os.path.exists(tmp_path / folder)
    assert load_library("fused", tmp_path / folder) is None, "that one was not built, and there is no compiler"
    assert {variant.machine for variant in fitting} <= {variant.machine for variant in VARIANTS}


@pytest.mark.parametrize("fault", ["is writable by other users", "file too short"])
def test_a_refused_prebuilt_kernel_is_logged_and_the_kernel_is_compiled(
    fault: str,
    tmp_path: Path,
    no_options: pytest.MonkeyPatch,
    lora_kernel: LoraKernel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refused = [prebuilt_path(tmp_path / "prebuilt", variant, "fused") for variant in this_processor().fitting()]
    if not refused:
        pytest.skip("no variant is for this processor")
    for library in refused:
        library.parent.mkdir(parents=True)
        library.touch(mode=0o644)
        library.parent.chmod(0o755 if fault == "file too short" else 0o775)
    no_options.setattr(kernel_loading, "PREBUILT", tmp_path / "prebuilt")
    assert load_library("fused", tmp_path / "cache") is not None
    assert len(libraries(tmp_path / "cache")) == 1
    assert len(caplog.records) == len(refused)
    for record, library in zip(caplog.records, refused, strict=True):
        assert record.levelno == logging.WARNING
        assert f"cannot load kernel fused from {library}: " in record.getMessage() and fault in record.getMessage()


def test_kernels_load_no_second_openmp_runtime(tmp_path: Path, lora_kernel: LoraKernel) -> None:
    """Runs in a separate process, because this one may have loaded other runtimes. It compiles the kernel itself."""
    code = f"""
import torch
from pathlib import Path
from threadpoolctl import threadpool_info
from gpu_worker.model.lora_kernel import LoraKernel
def runtimes():
    return sorted(found["filepath"] for found in threadpool_info() if found["user_api"] == "openmp")
before = runtimes()
assert LoraKernel.load(Path({str(tmp_path)!r})) is not None
assert runtimes() == before != [], (before, runtimes())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    [library] = libraries(tmp_path)
    assert b"libgomp.so" not in library.read_bytes() and b"libomp.so" not in library.read_bytes()
    assert any(found["user_api"] == "openmp" for found in threadpool_info())


def test_a_kernel_for_another_kind_of_runtime_is_refused(
    tmp_path: Path, no_options: pytest.MonkeyPatch, lora_kernel: LoraKernel, caplog: pytest.LogCaptureFixture
) -> None:
    """clang's OpenMP calls functions that GNU's runtime does not have."""
    source = tmp_path / "clangs.cpp"
    source.write_text('extern "C" void __kmpc_no_such_call(); extern "C" void f() { __kmpc_no_such_call(); }\n')
    (tmp_path / "cache" / "native").mkdir(parents=True, mode=0o700)
    no_options.setattr(kernel_loading, "name_library", lambda name: source)
    assert [load_library("fused", tmp_path / "cache") for _ in range(2)] == [None, None]
    assert caplog.text.count("__kmpc_no_such_call") == 1, "it is compiled and refused once"
