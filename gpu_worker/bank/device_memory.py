"""Measure the memory that a device has left for this process, and allocate tensors of the host."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import re
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpu_worker.errors import WorkerConfigInvalid

_PROC = Path("/proc")
_STRICT = 2  # vm.overcommit_memory: Linux charges every mapping, also with MAP_NORESERVE
_ALIGNMENT = 128  # bytes that a processor reads together
_CGROUPS = Path("/sys/fs/cgroup")  # this process's own, as seen inside a container
_NAMES = (  # files of limit, usage and statistics, and the key of cached files; cgroup version 2, then 1
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def free_bytes(device: torch.device, share: float = 1.0) -> int:
    """Return the free bytes for this process; on a GPU at most `share` of its total memory.

    The share matters because workers of one GPU may plan at the same time and each sees all memory as free.
    Raises: WorkerConfigInvalid if torch finds no such device.
    """
    if device.type == "cpu":
        available = _sizes(_PROC / "meminfo")["MemAvailable"]  # Linux's estimate, without swapping
        return min([available, *cgroup_bytes(_CGROUPS)])
    if not torch.cuda.is_available():
        raise WorkerConfigInvalid(
            f"device is '{device.type}' but torch {torch.__version__} finds none; use 'cpu' or install torch for CUDA"
        )
    return limit_to_share(*torch.cuda.mem_get_info(device), share)


def limit_to_share(num_free_bytes: int, num_bytes: int, share: float) -> int:
    """Return the smaller of the free bytes and the process's share of all bytes."""
    return min(num_free_bytes, int(share * num_bytes))


def cgroup_bytes(root: Path) -> list[int]:
    """Return the bytes left under each limit below `root`. Cached files count as free: Linux reclaims them first."""
    left = []
    for limit, usage, stat, inactive in _NAMES:
        if (root / limit).exists() and (root / limit).read_text().strip() != "max":
            counts = dict(line.split() for line in (root / stat).read_text().splitlines())
            left.append(int((root / limit).read_text()) - int((root / usage).read_text()) + int(counts[inactive]))
    return left


@dataclass(frozen=True, slots=True)
class MappingLimit:
    """A limit on this process's mappings, which counts memory that is never written too."""

    name: str
    free_bytes: int


def mapping_limits(
    proc: Path = _PROC, limits_of: Callable[[int], Sequence[int]] = resource.getrlimit
) -> list[MappingLimit]:
    """Return the limits in force: of the process (RLIMIT_AS, RLIMIT_DATA) and of strict overcommit."""
    used = _sizes(proc / "self/status")
    found = []
    for name, kind, size in (
        ("RLIMIT_AS", resource.RLIMIT_AS, "VmSize"),
        ("RLIMIT_DATA", resource.RLIMIT_DATA, "VmData"),
    ):
        limit = limits_of(kind)[0]
        if limit != resource.RLIM_INFINITY:
            found.append(MappingLimit(name, limit - used[size]))
    if int((proc / "sys/vm/overcommit_memory").read_text()) == _STRICT:
        sizes = _sizes(proc / "meminfo")
        found.append(MappingLimit("vm.overcommit_memory=2", sizes["CommitLimit"] - sizes["Committed_AS"]))
    return found


def zeros_on_huge_pages(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return zeros in host memory, on huge pages where Linux has them: reading many megabytes is then faster.

    A processor caches the addresses of few pages, and a page of 4 KiB is read within a microsecond.
    """
    num_values = torch.Size(shape).numel()
    if num_values == 0:
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, num_values * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    use_huge_pages(memory)
    return torch.frombuffer(memory, dtype=dtype).view(shape)  # the tensor owns the mapping


class SharedPages:
    """Zeros of many small tensors, one after the other in a mapping on huge pages. A small mapping would get none."""

    def __init__(self, num_bytes: int = 32 << 20) -> None:
        """`num_bytes`: of one mapping. A tensor of a quarter and more has its own."""
        self._num_bytes, self._used = num_bytes, num_bytes
        self._memory = torch.empty(0, dtype=torch.uint8)

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return zeros, whose memory is free when no tensor of the mapping is used any more."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if num_bytes >= self._num_bytes // 4:
            return zeros_on_huge_pages(*shape, dtype=dtype)
        if self._used + num_bytes > self._num_bytes:
            self._memory, self._used = zeros_on_huge_pages(self._num_bytes, dtype=torch.uint8), 0
        start = self._used
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return self._memory[start : start + num_bytes].view(dtype).view(shape)


def release_pages(zeros: Tensor) -> None:
    """Give Linux the pages of a tensor of `zeros_on_huge_pages` whose numbers may become zeros again."""
    _madvise(zeros.data_ptr(), zeros.nbytes)


def release_unused(smaps: Path = _PROC / "self/smaps") -> None:
    """Give Linux the memory that the start has freed, and the pages of weight files that it read and did not change.

    Those pages stay in the cache of files; a later access finds them there, or reads the file.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # of glibc
        libc.malloc_trim(0)
    with contextlib.suppress(OSError):  # some kernels and containers have no such file
        for start, end in _unchanged(smaps.read_text(errors="replace")):
            _madvise(start, end - start)


def _madvise(address: int, num_bytes: int) -> None:
    ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), mmap.MADV_DONTNEED)


def _unchanged(smaps: str) -> Iterator[tuple[int, int]]:
    """Yield the addresses of the mappings of safetensors files without a page that this process has written to."""
    for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", smaps):
        head, _, counts = entry.partition("\n")
        is_unchanged = all(re.search(rf"^{kind}: +0 kB$", counts, re.MULTILINE) for kind in ("Anonymous", "Swap"))
        if head.endswith(".safetensors") and is_unchanged:  # pages that were changed may have been swapped out
            start, _, end = head.partition(" ")[0].partition("-")
            yield int(start, 16), int(end, 16)


def use_huge_pages(memory: mmap.mmap) -> None:
    """Let Linux use huge pages for this mapping, where it has them."""
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)


def _sizes(path: Path) -> dict[str, int]:
    """Return the sizes in a file of /proc, converted from KiB to bytes."""
    lines = (line.partition(":") for line in path.read_text().splitlines())
    return {name: int(value.split()[0]) << 10 for name, _, value in lines if value.endswith(" kB")}
