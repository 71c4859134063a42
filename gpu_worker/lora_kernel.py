"""`grouped_lora.cpp`: compiled once for this processor, and called with torch's tensors.

The library takes plain pointers, so that it is built in seconds without torch's headers. It runs in torch's own pool of
OpenMP threads: torch's libgomp is loaded under the same name before it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("grouped_lora.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Pairs(ctypes.Structure):
    """`Pairs` of the source. `values_of` keeps alive what it points to; `h_len`: values of h for one module."""

    _fields_ = (
        ("num_adapters", c_int32),
        ("num_slots", c_int32),
        ("h_len", c_int64),
        ("slot_tokens", c_void_p),
        ("pair_starts", c_void_p),
        ("pair_slots", c_void_p),
        ("pair_weights", c_void_p),
        ("rank_starts", c_void_p),
        ("rank_rows", c_void_p),
        ("h_starts", c_void_p),
        ("fusion", c_void_p),
        ("max_rank", c_int32),
        ("num_threads", c_int32),
    )
    h_len: int
    values_of: dict[str, NDArray[np.generic]]

    @classmethod
    def of(
        cls,
        *,
        slot_tokens: NDArray[np.generic],
        fusion: NDArray[np.generic],
        slots: Sequence[NDArray[np.int32]],
        weights: NDArray[np.generic],
        rank_rows: Sequence[Sequence[int]],
        num_threads: int,
    ) -> Pairs:
        """`slots` and `rank_rows` by adapter; `weights` of all pairs, adapter by adapter."""
        counts = np.array([len(of_adapter) for of_adapter in slots], dtype=np.int64)
        ranks = np.array([len(rows) for rows in rank_rows], dtype=np.int64)
        h_starts = _starts(counts * ranks)
        values: dict[str, NDArray[np.generic]] = {
            "slot_tokens": slot_tokens,
            "pair_starts": _starts(counts).astype(np.int32),
            "pair_slots": np.concatenate(slots) if slots else np.zeros(0, np.int32),
            "pair_weights": weights,
            "rank_starts": _starts(ranks).astype(np.int32),
            "rank_rows": np.array([row for rows in rank_rows for row in rows], dtype=np.int32),
            "h_starts": h_starts,
        }
        if fusion.any():
            values["fusion"] = fusion
        pairs = cls(num_adapters=len(slots), num_slots=len(slot_tokens), h_len=int(h_starts[-1]))
        pairs.max_rank, pairs.num_threads = int(ranks.max(initial=0)), num_threads
        for name, array in values.items():
            setattr(pairs, name, array.ctypes.data)
        pairs.values_of = values
        return pairs


class LoraKernel:
    """The compiled products. Tensors are contiguous, on the CPU, all of one dtype: float32 or bfloat16."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._shrink = {dtype: getattr(library, f"shrink_{suffix}") for dtype, suffix in _SUFFIXES.items()}
        self._expand = {dtype: getattr(library, f"expand_{suffix}") for dtype, suffix in _SUFFIXES.items()}
        for shrink in self._shrink.values():
            shrink.argtypes, shrink.restype = (c_void_p, c_void_p, c_int64, c_void_p, c_int32, c_void_p), None
        for expand in self._expand.values():
            expand.argtypes, expand.restype = (c_void_p, c_void_p, c_void_p, c_int64, c_void_p), None

    def shrink(self, pairs: Pairs, x: Tensor, a: Tensor, num_modules: int) -> Tensor:
        """h (M, h_len) of M modules that read x (..., N, I): compose(A · x). a (P · M, I): see `InputBank`."""
        h = torch.empty(num_modules, pairs.h_len)
        x = x.contiguous()
        shrink = self._shrink[x.dtype]
        shrink(ctypes.addressof(pairs), x.data_ptr(), x.shape[-1], a.data_ptr(), num_modules, h.data_ptr())
        return h

    def expand(self, pairs: Pairs, h: Tensor, bt: Tensor, y: Tensor) -> None:
        """y (..., N, O) += h · B of one module, in place. h (h_len,), bt (P, O)."""
        assert y.is_contiguous(), "the kernel writes rows of O adjacent values"
        self._expand[y.dtype](ctypes.addressof(pairs), h.data_ptr(), bt.data_ptr(), y.shape[-1], y.data_ptr())


def load_kernel(cache_dir: Path) -> LoraKernel | None:
    """The kernel, compiled into `cache_dir` unless it is there; None where no compiler makes it, which is logged."""
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None:
        logger.info("no C++ compiler: LoRA products run through torch, which takes longer")
        return None
    library = cache_dir / "native" / f"grouped_lora-{_fingerprint(compiler)}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(library.with_suffix(".lock")):
        if not library.exists() and not _compile(compiler, library):
            return None
    return LoraKernel(ctypes.CDLL(str(library)))


def _compile(compiler: str, library: Path) -> bool:
    """Compile beside `library` and move it into place, so that half of one is never found."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch, library.name)
        run = subprocess.run([compiler, *_FLAGS, str(_SOURCE), "-o", str(made)], capture_output=True, text=True)
        if run.returncode != 0:
            logger.warning("%s could not make %s; LoRA products run through torch: %s", compiler, made.name, run.stderr)
            return False
        made.rename(library)
    return True


def _fingerprint(compiler: str) -> str:
    """Of all that the library depends on: the source, how it is compiled, and by what for which processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    parts = (_SOURCE.read_text(), *_FLAGS, version, _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join(sorted(set(told))) or platform.processor()


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
