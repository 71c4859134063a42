"""Compile the C++ sources of this package into libraries of plain functions.

The functions take plain pointers, so they build in seconds without torch's headers. They link no OpenMP runtime: at
load they resolve to the one that torch has loaded (`kernel_loading.py`).
Imports only the standard library, because the image's build stage has no torch.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
LIMIT_S = 120.0  # timeout of one compiler call, which takes up to 10 s; with the checks of `make sanitize` 60 to 100 s
_OPTIONS = ("-O3", "-std=c++17", "-fopenmp", "-fPIC", "-Wno-psabi")
_COMPILERS = ("g++", "c++")


class KernelUnavailable(Exception):
    """A compiled kernel is not available; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler: its command line, and the options added to every call."""

    command: tuple[str, ...]
    options: tuple[str, ...] = ()

    @classmethod
    def find(cls, environment: Mapping[str, str] = os.environ) -> Compiler:
        """Return `$CXX` with `$CXXFLAGS`, or the first compiler on the path. Raises: KernelUnavailable."""
        options = tuple(shlex.split(environment.get("CXXFLAGS", "")))
        chosen = shlex.split(environment.get("CXX", ""))
        candidates = [chosen] if chosen else [[name] for name in _COMPILERS]
        for name, *words in candidates:
            if path := shutil.which(name, path=environment.get("PATH")):
                return cls((path, *words), options)
        names = " ".join(chosen) or ", ".join(_COMPILERS)
        raise KernelUnavailable(f"no C++ compiler found ({names}); install one (Debian package g++) or set CXX")

    def compile(self, source: Path, options: Sequence[str], library: Path, limit_s: float = LIMIT_S) -> None:
        """Build `library` from `source`. It is there as a whole or not at all, also after a power failure.

        Raises: KernelUnavailable if the compiler fails or takes longer than `limit_s`.
        """
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            parts, made = Path(scratch, "parts.o"), Path(scratch, library.name)
            self._run(*_OPTIONS, *options, "-c", str(source), "-o", str(parts), limit_s=limit_s)
            self._run(
                "-shared", str(parts), "-o", str(made), limit_s=limit_s
            )  # without -fopenmp, so no runtime is linked
            made.chmod(0o644)
            _flush_to_disk(made)
            made.rename(library)
        _flush_to_disk(library.parent)

    def _run(self, *arguments: str, limit_s: float) -> None:
        command = [*self.command, *self.options, *arguments]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
        except subprocess.TimeoutExpired as exc:
            raise KernelUnavailable(f"{self.command[0]} did not finish within {limit_s:g} s") from exc
        if run.returncode != 0:
            raise KernelUnavailable(f"{shlex.join(command)} failed: {run.stderr.strip()}")


def _flush_to_disk(path: Path) -> None:
    """Flush the file or folder, as `lora_store.files` does. The image's build stage has this package alone."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def kernel_names() -> list[str]:
    """Return the names of all kernels, one per source file."""
    return sorted(path.stem for path in FOLDER.glob("*.cpp"))


def name_library(name: str) -> Path:
    return FOLDER / f"{name}.cpp"


def file_name(name: str, *parts: str) -> str:
    """Return the library's file name, which has a digest of its sources, its options and `parts`."""
    digest = hashlib.sha256("\0".join((_read_sources(name), *_OPTIONS, *parts)).encode()).hexdigest()
    return f"{name}-{digest[:16]}.so"


@cache
def _read_sources(name: str) -> str:
    """Return the sources of a kernel. A start asks for each name of several variants."""
    return "\0".join(path.read_text(encoding="utf-8") for path in (name_library(name), *sorted(FOLDER.glob("*.h"))))
