"""Count the CPUs this process may use, on the machine where it runs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from gpu_worker.config import WorkerConfig

Config = TypeVar("Config", bound=WorkerConfig)
_CGROUPS = Path("/sys/fs/cgroup")  # this process's own, as seen inside a container


def with_threads(config: Config) -> Config:
    """Return the config with `num_threads` set: its own value, or one thread for each usable CPU."""
    return replace(config, num_threads=config.num_threads or usable_cpus())


def usable_cpus() -> int:
    """Return the CPUs in this process's affinity mask, limited by the whole CPUs of the container's quota."""
    return max(1, min([len(os.sched_getaffinity(0)), *(int(quota) for quota in cgroup_quotas(_CGROUPS))]))


def cgroup_quotas(root: Path) -> list[float]:
    """Return each quota below `root` in CPUs (CPU time per wall time). Without a quota the list is empty.

    Callers round down: a throttled thread would delay its whole OpenMP team.
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
