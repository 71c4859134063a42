"""Load the compiled kernels: those built ahead of time for this kind of processor, or compiled now for this very one.

The kernels are optional: whatever goes wrong with one is logged as a warning, and torch does its work more slowly.
"""

from __future__ import annotations

import ctypes
import logging
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from threadpoolctl import threadpool_info

from gpu_worker.config import WorkerConfig
from gpu_worker.native.build_kernels import prebuilt_path
from gpu_worker.native.kernel_build import (
    FOLDER,
    LIMIT_S,
    Compiler,
    KernelUnavailable,
    file_name,
    kernel_names,
    source_of,
)
from gpu_worker.native.kernel_variants import Processor, this_processor

logger = logging.getLogger(__name__)

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
PREBUILT = FOLDER / "prebuilt"
_NATIVE = ("-march=native",)
_LOCK_S = 4 * LIMIT_S  # another process compiles the same kernel


def load_library(name: str, cache_dir: Path) -> ctypes.CDLL | None:
    """Return the library of `<name>.cpp`: the first existing one that loads here, or one compiled into `cache_dir`.

    A library that exists needs neither a compiler nor a folder that can be written. Log a warning for every file that
    is refused, as one that another user could have written. Return None, after a warning, where nothing is left to
    load: no compiler, or a folder that cannot be used.
    """
    try:
        share_openmp()
        processor = this_processor()
        compiled = cache_dir / "native" / _compiled_name(name, processor, os.environ)
        existing = [path for path in (*_prebuilt(name, processor), compiled) if path.exists()]
        if found := _first_that_loads(name, existing):
            return found
        _compile(name, compiled, replace=compiled in existing)
        return _open(compiled)
    except (KernelUnavailable, OSError, Timeout) as exc:
        logger.warning("the kernel %s is off, and torch does its work more slowly: %s", name, exc)
        return None


def num_missing_kernels(config: WorkerConfig) -> int:
    """Return how many of the kernels a worker with these settings runs without; none are meant to run on a GPU."""
    if config.device != "cpu":
        return 0
    return sum(load_library(name, config.cache_dir) is None for name in kernel_names())


def functions(library: ctypes.CDLL, name: str, *argtypes: type) -> dict[torch.dtype, Callable[..., None]]:
    """Return `<name>_<suffix>` for every dtype; the functions return nothing."""
    found = {dtype: getattr(library, f"{name}_{suffix}") for dtype, suffix in SUFFIXES.items()}
    for function in found.values():
        function.argtypes, function.restype = argtypes, None
    return found


def share_openmp() -> None:
    """Let kernels find the OpenMP runtime that torch has loaded, which no other library may double.

    Two runtimes would each keep threads of their own on the same cores. torch's file has a plain name in one wheel and
    a hashed one in another, so a kernel linked with `libgomp.so.1` could bring the system's copy along. A kernel that
    was compiled for a runtime of another kind (clang's, beside torch with GNU's) finds no functions and does not load.
    Raises: KernelUnavailable where torch has no such runtime.
    """
    runtimes = [Path(found["filepath"]) for found in threadpool_info() if found["user_api"] == "openmp"]
    package = Path(torch.__file__).resolve().parent
    folders = (package, package.with_name("torch.libs"))
    own = [path for path in runtimes if any(path.resolve().is_relative_to(folder) for folder in folders)]
    if not own and len(runtimes) != 1:
        raise KernelUnavailable(f"torch's OpenMP runtime cannot be identified among: {runtimes or 'none is loaded'}")
    ctypes.CDLL(str((own or runtimes)[0]), mode=ctypes.RTLD_GLOBAL)


def check_trusted(library: Path, user: int) -> None:
    """Raise KernelUnavailable where anyone but `user` and root could have written the file or its folder."""
    for path in (library.parent, library):
        found = path.stat()
        if found.st_uid not in (0, user):
            raise KernelUnavailable(f"{path} belongs to user {found.st_uid}, and code of others is not loaded")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise KernelUnavailable(f"{path} can be written by other users; take that right away (chmod go-w)")


def _prebuilt(name: str, processor: Processor) -> list[Path]:
    """Return where libraries built ahead of time for such a processor would be, the fastest first."""
    if os.environ.get("CXXFLAGS"):  # options of one's own ask for a build of one's own
        return []
    return [prebuilt_path(PREBUILT, variant, name) for variant in processor.fitting()]


def _first_that_loads(name: str, libraries: Iterable[Path]) -> ctypes.CDLL | None:
    """Return the first library that loads, and log a warning for each one before it."""
    for library in libraries:
        try:
            return _open(library)
        except (KernelUnavailable, OSError) as exc:
            logger.warning("the kernel %s is not loaded from %s: %s", name, library, exc)
    return None


def _compiled_name(name: str, processor: Processor, environment: Mapping[str, str]) -> str:
    """Return the file name of the library compiled for this very processor with this choice of compiler and options.

    No version of the compiler is part of it: the file can be found where there is no compiler, and a newer compiler
    makes the same functions of the same sources.
    """
    chosen = [f"{variable}={environment.get(variable, '')}" for variable in ("CXX", "CXXFLAGS")]
    return file_name(name, *_NATIVE, *chosen, processor.description)


def _compile(name: str, library: Path, *, replace: bool) -> None:
    """Compile the library, unless another process did meanwhile. `replace`: the file there is refused.

    Raises: KernelUnavailable, OSError, Timeout.
    """
    compiler = Compiler.find()
    _private(library.parent)
    with FileLock(library.with_suffix(".lock"), timeout=_LOCK_S):
        if replace or not library.exists():
            compiler.compile(source_of(name), _NATIVE, library)


def _private(folder: Path) -> None:
    """Create the folder for this user alone, and take others' right to write from one that this user has made."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid == os.geteuid() and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        folder.chmod(0o700)


def _open(library: Path) -> ctypes.CDLL:
    check_trusted(library, os.geteuid())
    return ctypes.CDLL(str(library))
