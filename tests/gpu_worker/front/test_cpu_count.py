"""The number of threads that a worker uses on its machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpu_worker.config import WorkerConfig
from gpu_worker.front.cpu_count import cgroup_quotas, usable_cpus, with_threads


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, []),
        ({"cpu.max": "max 100000"}, []),
        ({"cpu.max": "400000 100000"}, [4.0]),
        ({"cpu.max": "150000 100000"}, [1.5]),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, []),
        ({"cpu/cpu.cfs_quota_us": "25000", "cpu/cpu.cfs_period_us": "50000"}, [0.5]),
        ({"cpu.max": "200000 100000", "cpu/cpu.cfs_quota_us": "30", "cpu/cpu.cfs_period_us": "10"}, [2.0, 3.0]),
        ({"cpu/cpu.cfs_quota_us": "30"}, []),
    ],
    ids=str,
)
def test_a_quota_is_read_from_either_version(tmp_path: Path, files: dict[str, str], expected: list[float]) -> None:
    write(tmp_path, files)
    assert cgroup_quotas(tmp_path) == expected


def test_a_process_limited_to_one_cpu_counts_one() -> None:
    allowed = os.sched_getaffinity(0)
    assert 1 <= usable_cpus() <= len(allowed)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert usable_cpus() == 1
        assert with_threads(WorkerConfig()).num_threads == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_a_configured_number_is_kept() -> None:
    assert with_threads(WorkerConfig(num_threads=7)).num_threads == 7
