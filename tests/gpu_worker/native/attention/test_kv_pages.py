"""Pages on a device and in host memory: where values are written, who owns pages, and which are freed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpu_worker.model.attention_plan import Segment
from gpu_worker.native.attention.kv_cache import KvShape
from gpu_worker.native.attention.kv_pages import DeviceKvCache, HostKvCache
from tests.gpu_worker.engine_driver import kv_shape
from tests.gpu_worker.slow_varlen_attention import slow_varlen_attn

CPU = torch.device("cpu")


@pytest.mark.parametrize("build", [HostKvCache, lambda shape: DeviceKvCache(shape, CPU, slow_varlen_attn)])
def test_freed_pages_are_wiped_and_the_others_are_not(build: Callable[[KvShape], HostKvCache | DeviceKvCache]) -> None:
    cache = build(kv_shape(num_tokens=80, page_tokens=16, max_len=40))
    row, other = cache.allocate(20, 20), cache.allocate(20, 20)
    tokens = torch.full((2, 20, 4), float("nan"))
    for each in (row, other):
        plan = cache.attention([Segment(each, 0, 20, 0)])
        plan.attend(0, torch.zeros(4, 20, 4), tokens, tokens, scaling=1.0, sliding_window=None)
    [store] = cache.stores
    num_written = int(store.isnan().sum())
    assert num_written == 2 * 2 * 20 * 2 * 4
    cache.free(row)
    assert int(store.isnan().sum()) == num_written / 2
    cache.free(other)
    assert not store.any()


def test_host_memory_is_used_for_written_tokens_only() -> None:
    """32 TiB are mapped, far more than a machine has."""
    shape = kv_shape(num_heads=8, head_dim=512, num_rows=4, max_len=1 << 27, num_tokens=1 << 29, page_tokens=1 << 16)
    before = int(Path("/proc/self/statm").read_text().split()[1])
    cache = HostKvCache(shape)
    assert cache.num_bytes == 1 << 45
    cache.keys[1][7, -1] = 1
    assert float(cache.keys[1][7, -1].sum()) == 512
    assert int(Path("/proc/self/statm").read_text().split()[1]) - before < 2048, "pages of the operating system"
