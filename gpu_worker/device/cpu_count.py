"""How many CPUs this process may use: of the machine it runs on, not of the one that built the application."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from gpu_worker.config import WorkerConfig

_CGROUPS = Path("/sys/fs/cgroup")  # of this process, as a container sees them


def with_threads(config: WorkerConfig) -> WorkerConfig:
    """Return the config with a number of threads: its own, else one for each CPU this process may use."""
    return replace(config, num_threads=config.num_threads or usable_cpus())


def usable_cpus() -> int:
    """Return the CPUs of this process's affinity, at most as many whole ones as its container's quota allows."""
    return max(1, min([len(os.sched_getaffinity(0)), *(int(quota) for quota in cgroup_quotas(_CGROUPS))]))


def cgroup_quotas(root: Path) -> list[float]:
    """Return each quota below `root` in CPUs: time that may be used by time that passes. None where there is none.

    A share of a CPU counts for no thread: a team waits for its slowest, and one that is throttled is that.
    """
    quotas = []
    for limit, period in (*_version_2(root), *_version_1(root)):
        if limit.lstrip("-").isdigit() and int(limit) > 0 and int(period) > 0:  # else "max", or -1
            quotas.append(int(limit) / int(period))
    return quotas


def _version_2(root: Path) -> list[tuple[str, str]]:
    path = root / "cpu.max"
    if not path.exists():
        return []
    limit, period = path.read_text().split()
    return [(limit, period)]


def _version_1(root: Path) -> list[tuple[str, str]]:
    limit, period = root / "cpu" / "cpu.cfs_quota_us", root / "cpu" / "cpu.cfs_period_us"
    return [(limit.read_text().strip(), period.read_text().strip())] if limit.exists() and period.exists() else []
