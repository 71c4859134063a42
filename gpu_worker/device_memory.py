"""How much memory a device has left for this process."""

from __future__ import annotations

from pathlib import Path

import torch

from gpu_worker.errors import WorkerConfigInvalid

_CGROUPS = Path("/sys/fs/cgroup")  # of this process, as a container sees them
_NAMES = (  # of the limit, what is used of it, its statistics, and what in them is cached files; version 2, then 1
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def free_bytes(device: torch.device) -> int:
    """What a process may still take. Raises: WorkerConfigInvalid where torch finds no such device."""
    if device.type == "cpu":
        return min([_available_bytes(), *cgroup_bytes(_CGROUPS)])
    if not torch.cuda.is_available():
        raise WorkerConfigInvalid(f"device is {device.type}, and torch {torch.__version__} finds none")
    return torch.cuda.mem_get_info(device)[0]


def cgroup_bytes(root: Path) -> list[int]:
    """What each limit below `root` leaves. Cached files are given up before anybody is refused memory."""
    left = []
    for limit, usage, stat, inactive in _NAMES:
        if (root / limit).exists() and (root / limit).read_text().strip() != "max":
            counts = dict(line.split() for line in (root / stat).read_text().splitlines())
            left.append(int((root / limit).read_text()) - int((root / usage).read_text()) + int(counts[inactive]))
    return left


def _available_bytes() -> int:
    """Linux's own estimate of what may be taken without swapping."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10
