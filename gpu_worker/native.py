"""The C++ sources of this package: compiled once for this processor, and loaded as libraries of plain functions.

They take plain pointers, so that they are built in seconds without torch's headers. They run in torch's own pool of
OpenMP threads: torch's libgomp is loaded under the same name before them.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock

logger = logging.getLogger(__name__)

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")


def load_library(name: str, cache_dir: Path) -> ctypes.CDLL | None:
    """`<name>.cpp`, compiled into `cache_dir` unless it is there; None where no compiler makes it, which is logged."""
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None:
        logger.info("no C++ compiler: %s runs through torch, which takes longer", name)
        return None
    library = cache_dir / "native" / f"{name}-{_fingerprint(name, compiler)}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(library.with_suffix(".lock")):
        if not library.exists() and not _compile(name, compiler, library):
            return None
    return ctypes.CDLL(str(library))


def functions(library: ctypes.CDLL, name: str, *argtypes: type) -> dict[torch.dtype, Callable[..., None]]:
    """`<name>_<suffix>` of every dtype; they return nothing."""
    found = {dtype: getattr(library, f"{name}_{suffix}") for dtype, suffix in SUFFIXES.items()}
    for function in found.values():
        function.argtypes, function.restype = argtypes, None
    return found


def _compile(name: str, compiler: str, library: Path) -> bool:
    """Compile beside `library` and move it into place, so that half of one is never found."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch, library.name)
        command = [compiler, *_FLAGS, str(_FOLDER / f"{name}.cpp"), "-o", str(made)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            logger.warning("%s could not make %s, which runs through torch: %s", compiler, made.name, run.stderr)
            return False
        made.rename(library)
    return True


def _fingerprint(name: str, compiler: str) -> str:
    """Of all that the library depends on: the source, how it is compiled, and by what for which processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    sources = [path.read_text() for path in (_FOLDER / f"{name}.cpp", *sorted(_FOLDER.glob("*.h")))]
    parts = (*sources, *_FLAGS, version, _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join(sorted(set(told))) or platform.processor()
