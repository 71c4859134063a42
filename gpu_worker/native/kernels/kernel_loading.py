"""Load the compiled kernels: a prebuilt library for this kind of processor, or one compiled for this processor.

The kernels are optional. If one fails to load, a warning is logged and torch computes the same more slowly.
"""

from __future__ import annotations

import ctypes
import logging
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import ClassVar, Self

import torch
from filelock import FileLock, Timeout
from threadpoolctl import threadpool_info

from gpu_worker.config import WorkerConfig
from gpu_worker.native.kernels.build_kernels import prebuilt_path
from gpu_worker.native.kernels.kernel_build import (
    FOLDER,
    LIMIT_S,
    Compiler,
    KernelUnavailable,
    file_name,
    kernel_names,
    name_library,
)
from gpu_worker.native.kernels.kernel_variants import Processor, this_processor

logger = logging.getLogger(__name__)

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
PREBUILT = FOLDER / "prebuilt"
_NATIVE = ("-march=native",)
_LOCK_S = 4 * LIMIT_S  # wait for another process that compiles the same kernel


@cache
def load_library(name: str, cache_dir: Path) -> ctypes.CDLL | None:
    """Return the library of `<name>.cpp`: the first existing one that loads, or a new one compiled into `cache_dir`.

    An existing library needs neither a compiler nor a writable folder. Log a warning for every refused file, for
    example one that another user could have written. Return None, after a warning, if no library can be loaded; then
    this process does not try again.
    """
    try:
        share_openmp()
        processor = this_processor()
        compiled = cache_dir / "native" / _compiled_name(name, processor, os.environ)
        # Unlike the paths' own method, this counts a file below an unreadable folder as missing.
        existing = [path for path in (*_prebuilt(name, processor), compiled) if os.path.exists(path)]
        if found := _first_that_loads(name, existing):
            return found
        _compile(name, compiled, replace=compiled in existing)
        return _open(compiled)
    except (KernelUnavailable, OSError, Timeout) as exc:
        logger.warning("kernel %s is disabled, torch computes it more slowly: %s", name, exc)
        return None


class Kernel(ABC):
    """A compiled kernel: the functions of the library `library_name`."""

    library_name: ClassVar[str]

    @abstractmethod
    def __init__(self, library: ctypes.CDLL) -> None:
        """Find the functions."""

    @classmethod
    def load(cls, cache_dir: Path) -> Self | None:
        """Load the kernel, compiling it into `cache_dir` if needed. Return None, after a warning, if that fails."""
        library = load_library(cls.library_name, cache_dir)
        return None if library is None else cls(library)


def num_missing_kernels(config: WorkerConfig) -> int:
    """Return the number of CPU kernels that are not available. A GPU worker needs none.

    Those that have to be compiled are so at once, one for each of the worker's threads.
    """
    if config.device != "cpu":
        return 0
    with ThreadPoolExecutor(config.num_threads or len(os.sched_getaffinity(0))) as compilers:
        libraries = compilers.map(lambda name: load_library(name, config.cache_dir), kernel_names())
        return sum(library is None for library in libraries)


def functions(library: ctypes.CDLL, name: str, *argtypes: type) -> dict[torch.dtype, Callable[..., None]]:
    """Return the functions `<name>_<suffix>` by dtype. They return nothing."""
    return {dtype: find_function(library, f"{name}_{suffix}", *argtypes) for dtype, suffix in SUFFIXES.items()}


def find_function(library: ctypes.CDLL, name: str, *argtypes: type) -> Callable[..., None]:
    """Return a function of the library that has these arguments and returns nothing."""
    function = getattr(library, name)
    function.argtypes, function.restype = argtypes, None
    found: Callable[..., None] = function
    return found


def share_openmp() -> None:
    """Make torch's OpenMP runtime visible to the kernels, so that the process has only one.

    Two runtimes would run two thread teams on the same cores. The name of torch's file differs between wheels, so a
    kernel linked with `libgomp.so.1` could load the system's copy too. A kernel compiled for another runtime (clang's
    with a torch that uses GNU's) finds no functions and fails to load.
    Raises: KernelUnavailable if torch's runtime cannot be identified.
    """
    runtimes = [Path(found["filepath"]) for found in threadpool_info() if found["user_api"] == "openmp"]
    package = Path(torch.__file__).resolve().parent
    folders = (package, package.with_name("torch.libs"))
    own = [path for path in runtimes if any(path.resolve().is_relative_to(folder) for folder in folders)]
    if not own and len(runtimes) != 1:
        raise KernelUnavailable(f"cannot identify torch's OpenMP runtime among the loaded ones: {runtimes or 'none'}")
    ctypes.CDLL(str((own or runtimes)[0]), mode=ctypes.RTLD_GLOBAL)


def check_trusted(library: Path, user: int) -> None:
    """Raise KernelUnavailable if anyone except `user` and root could have written the file or its folder."""
    for path in (library.parent, library):
        found = path.stat()
        if found.st_uid not in (0, user):
            raise KernelUnavailable(
                f"{path} is owned by user {found.st_uid}; only code of this user and of root is loaded"
            )
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise KernelUnavailable(f"{path} is writable by other users; run chmod go-w on it")


def _prebuilt(name: str, processor: Processor) -> list[Path]:
    """Return the paths of prebuilt libraries that fit the processor, the fastest first. They may not exist."""
    if os.environ.get("CXXFLAGS"):  # the user's options require a new build
        return []
    return [prebuilt_path(PREBUILT, variant, name) for variant in processor.fitting()]


def _first_that_loads(name: str, libraries: Iterable[Path]) -> ctypes.CDLL | None:
    """Return the first library that loads. Log a warning for each one that does not."""
    for library in libraries:
        try:
            return _open(library)
        except (KernelUnavailable, OSError) as exc:
            logger.warning("cannot load kernel %s from %s: %s", name, library, exc)
    return None


def _compiled_name(name: str, processor: Processor, environment: Mapping[str, str]) -> str:
    """Return the file name of the library for this processor, compiler choice and options.

    The name does not include the compiler's version, so the file is found on machines without a compiler. A newer
    compiler makes the same functions from the same sources.
    """
    chosen = [f"{variable}={environment.get(variable, '')}" for variable in ("CXX", "CXXFLAGS")]
    return file_name(name, *_NATIVE, *chosen, processor.description)


def _compile(name: str, library: Path, *, replace: bool) -> None:
    """Compile the library unless another process has done so. `replace`: the existing file was refused.

    Raises: KernelUnavailable, OSError, Timeout.
    """
    compiler = Compiler.find()
    _private(library.parent)
    with FileLock(library.with_suffix(".lock"), timeout=_LOCK_S):
        if replace or not library.exists():
            compiler.compile(name_library(name), _NATIVE, library)


def _private(folder: Path) -> None:
    """Create the folder for this user only. Remove write access of others from an existing folder of this user."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid == os.geteuid() and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        folder.chmod(0o700)


def _open(library: Path) -> ctypes.CDLL:
    check_trusted(library, os.geteuid())
    return ctypes.CDLL(str(library))
