"""The memory that a container may still use."""

from __future__ import annotations

import gc
import itertools
import re
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gpu_worker.bank.device_memory import (
    MappingLimit,
    SharedPages,
    cgroup_bytes,
    free_bytes,
    limit_to_share,
    mapping_limits,
    release_unused,
    zeros_on_huge_pages,
)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


def test_unused_memory_and_cached_files_count_as_free(tmp_path: Path) -> None:
    assert cgroup_bytes(tmp_path) == []
    write(tmp_path, {"memory.max": "max"})
    assert cgroup_bytes(tmp_path) == [], "no limit"
    stat = "anon 300\ninactive_file 100\ntotal_inactive_file 150"
    write(tmp_path, {"memory.max": "1000", "memory.current": "600", "memory.stat": stat})
    assert cgroup_bytes(tmp_path) == [500]
    write(tmp_path / "memory", {"memory.limit_in_bytes": "2000", "memory.usage_in_bytes": "800", "memory.stat": stat})
    assert cgroup_bytes(tmp_path) == [500, 1350]


def test_workers_of_one_device_plan_with_at_most_its_memory() -> None:
    """If they plan at once, each sees all memory as free; the last of several finds less than its share."""
    assert limit_to_share(80, 80, 1.0) == 80
    assert limit_to_share(80, 80, 0.5) + limit_to_share(80, 80, 0.5) == 80
    assert 3 * limit_to_share(80, 80, 0.333) <= 80
    assert limit_to_share(30, 80, 0.5) == 30


def test_this_machine_has_free_memory_below_its_total() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) << 10
    assert 1 << 20 < free_bytes(torch.device("cpu")) < total


def proc_of(root: Path, overcommit: int) -> Path:
    """Write a /proc of a process with 3 MiB of mappings, 1 MiB of it data, on a machine with 5 MiB left to commit."""
    files = {
        "self/status": "Name:\tpython\nVmSize:\t    3072 kB\nVmData:\t    1024 kB\nThreads:\t1",
        "sys/vm/overcommit_memory": f"{overcommit}",
        "meminfo": "MemTotal:  90000 kB\nCommitLimit:    7168 kB\nCommitted_AS:    2048 kB\nHugePages_Total:  0",
    }
    write(root, files)
    return root


def test_mappings_are_limited_by_the_process_and_by_strict_overcommit(tmp_path: Path) -> None:
    bounds = {resource.RLIMIT_AS: 10 << 20, resource.RLIMIT_DATA: 4 << 20}
    assert mapping_limits(proc_of(tmp_path, 2), lambda kind: (bounds[kind], -1)) == [
        MappingLimit("RLIMIT_AS", 7 << 20),
        MappingLimit("RLIMIT_DATA", 3 << 20),
        MappingLimit("vm.overcommit_memory=2", 5 << 20),
    ]
    for overcommit in (0, 1):
        assert mapping_limits(proc_of(tmp_path, overcommit), lambda kind: (resource.RLIM_INFINITY, -1)) == []


def test_this_process_reads_its_own_limits() -> None:
    assert all(limit.free_bytes > 0 for limit in mapping_limits())
    bounded = mapping_limits(limits_of=lambda kind: (1 << 50, -1))
    assert [limit.name for limit in bounded[:2]] == ["RLIMIT_AS", "RLIMIT_DATA"]
    assert all(0 < limit.free_bytes < 1 << 50 for limit in bounded[:2])


def test_large_tensors_are_zeros_that_outlive_their_maker() -> None:
    cases = list(itertools.product([(3, 5), (0, 7), (2, 1024, 1024)], [torch.bfloat16, torch.float32]))
    made = [zeros_on_huge_pages(*shape, dtype=dtype) for shape, dtype in cases]
    gc.collect()  # takes seconds among the objects of all tests
    for x, (shape, dtype) in zip(made, cases, strict=True):
        assert x.shape == shape and x.dtype == dtype and x.is_contiguous() and not x.any()
        assert x.fill_(2).eq(2).all()


def test_small_tensors_share_pages_and_large_ones_have_their_own() -> None:
    pages = SharedPages(num_bytes=4096)
    shapes = [(3, 5), (0,), (1,), (512,), *[(4, 110)] * 5]
    made = [pages.zeros(*shape, dtype=torch.bfloat16) for shape in shapes]
    starts = [x.data_ptr() for x in made if x.numel()]
    assert all(not start % 128 for start in starts) and len({*starts}) == len(starts)
    shared = [start - starts[0] for start in starts if 0 <= start - starts[0] < 4096]
    assert shared == [0, 128, 256, 1152, 2048, 2944], "the fourth has its own mapping, the last a new one"
    for value, x in enumerate(made, 1):
        assert not x.any()
        x.fill_(value)
    assert all(x.eq(value).all() for value, x in enumerate(made, 1)), "no two tensors overlap"


def test_large_tensors_are_on_huge_pages_where_linux_has_them() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this Linux has no huge pages")
    before = huge_page_bytes()
    x = zeros_on_huge_pages(8, 1024, 1024, dtype=torch.float32).fill_(1)
    assert huge_page_bytes() > before and x.eq(1).all()


def huge_page_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages"))


def resident(path: Path) -> list[int]:
    """Return the resident KiB of each mapping of the file."""
    entries = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    own = [entry for entry in entries if entry.partition("\n")[0].endswith(str(path))]
    return [int(re.findall(r"^Rss: +(\d+) kB$", entry, re.MULTILINE)[0]) for entry in own]


def test_pages_of_weight_files_are_released_unless_they_were_changed(tmp_path: Path) -> None:
    """The tensors keep their numbers, those of the file and those written to a private copy of its pages."""
    files = [tmp_path / name for name in ("read.safetensors", "changed.safetensors", "other.bin")]
    for path in files:
        save_file({"x": torch.arange(1 << 20)}, path)
    tensors = [torch.from_file(str(path), size=(path.stat().st_size) // 8, dtype=torch.int64) for path in files]
    tensors[1][-1] = 7
    sums = [int(tensor.sum()) for tensor in tensors]
    before = [resident(path)[0] for path in files]
    assert min(before) > 4 << 10
    release_unused()
    assert [resident(path)[0] for path in files] == [0, *before[1:]]
    assert [int(tensor.sum()) for tensor in tensors] == sums and tensors[1][-1] == 7


def test_changed_pages_that_are_swapped_out_stay(tmp_path: Path) -> None:
    """Linux counts them as Swap instead of Anonymous, and forgets them with a release."""
    file, smaps = tmp_path / "swapped.safetensors", tmp_path / "smaps"
    save_file({"x": torch.arange(1 << 20)}, file)
    tensor = torch.from_file(str(file), size=file.stat().st_size // 8, dtype=torch.int64)
    assert tensor.sum() and resident(file) != [0]
    smaps.write_text(re.sub(r"(?m)^Swap: +0 kB$", "Swap:                  4 kB", Path("/proc/self/smaps").read_text()))
    for listed in (smaps, tmp_path / "missing"):  # a Linux that does not list mappings
        release_unused(listed)
        assert resident(file) != [0]
