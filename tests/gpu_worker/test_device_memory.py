"""What a container may still take."""

from __future__ import annotations

from pathlib import Path

import torch

from gpu_worker.device_memory import cgroup_bytes, free_bytes


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


def test_a_limit_leaves_what_is_not_used_and_what_files_hold(tmp_path: Path) -> None:
    stat = "anon 300\ninactive_file 100\ntotal_inactive_file 150"
    write(tmp_path, {"memory.max": "1000", "memory.current": "600", "memory.stat": stat})
    assert cgroup_bytes(tmp_path) == [500]
    write(
        tmp_path / "memory",
        {"memory.limit_in_bytes": "2000", "memory.usage_in_bytes": "800", "memory.stat": stat},
    )
    assert cgroup_bytes(tmp_path) == [500, 1350]


def test_no_limit_is_none(tmp_path: Path) -> None:
    assert cgroup_bytes(tmp_path) == []
    write(tmp_path, {"memory.max": "max"})
    assert cgroup_bytes(tmp_path) == []


def test_this_machine_has_memory_left_and_no_more_than_it_has_at_all() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) << 10
    assert 1 << 20 < free_bytes(torch.device("cpu")) < total
