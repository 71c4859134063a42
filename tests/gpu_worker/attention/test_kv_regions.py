"""Regions of keys and values: where values are written, and which memory is freed."""

from __future__ import annotations

from pathlib import Path

import torch

from gpu_worker.attention.kv_regions import KvRegions, region_bytes
from gpu_worker.step.attention_plan import Segment
from tests.gpu_worker.engine_driver import kv_shape


def test_tokens_are_written_to_their_row_and_position_only() -> None:
    cache = KvRegions(kv_shape())
    plan = cache.attention([Segment(0, 0, 1, 4), Segment(2, 1, 2, 0)])
    query, key, value = torch.randn(4, 3, 4), torch.randn(2, 3, 4), torch.randn(2, 3, 4)  # (Q or H, N, D)
    plan.attend(1, query, key, value, scaling=1.0, sliding_window=None)
    expected_keys, expected_values = torch.zeros(3, 2, 5, 4), torch.zeros(3, 2, 5, 4)
    for token, (row, position) in enumerate([(0, 4), (2, 0), (2, 1)]):
        for head in range(2):
            expected_keys[row, head, position] = key[head, token]
            expected_values[row, head, position] = value[head, token]
    torch.testing.assert_close(cache.keys[1], expected_keys)
    torch.testing.assert_close(cache.values[1], expected_values)
    assert not cache.keys[0].any() and not cache.values[0].any()


def test_a_freed_row_is_wiped_and_the_others_are_not() -> None:
    cache = KvRegions(kv_shape())
    for stored in (*cache.keys, *cache.values):
        stored[:] = float("nan")
    assert [cache.allocate(5, 5) for _ in range(3)] == [0, 1, 2]
    cache.free(1)
    for stored in (*cache.keys, *cache.values):
        assert not stored[1].any()
        assert bool(stored[::2].isnan().all())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_is_used_for_written_tokens_and_freed_with_their_row() -> None:
    """Regions have 64 MiB: a few tokens use almost nothing, a full region all of it, a freed one nothing."""
    before = resident_bytes()
    cache = KvRegions(kv_shape(head_dim=512, max_len=4096, num_tokens=3 * 4096, page_tokens=16))
    row = cache.allocate(4096, 4096)
    for stored in (*cache.keys, *cache.values):
        stored[row, :, :2] = 1
    assert resident_bytes() - before < 8 << 20
    for stored in (*cache.keys, *cache.values):
        stored[row] = 1
    assert resident_bytes() - before > 60 << 20
    cache.free(row)
    assert resident_bytes() - before < 8 << 20


def test_regions_larger_than_the_machine_use_address_space_only() -> None:
    """256 rows of 131,072 tokens take 2 TiB. A few tokens are written, including the very last ones."""
    shape = kv_shape(num_heads=8, head_dim=512, num_rows=256, max_len=131_072, num_tokens=4096, page_tokens=16)
    assert shape.num_rows * region_bytes(shape) == 1 << 41
    before = resident_bytes()
    cache = KvRegions(shape)
    for row, position in ((0, 0), (255, 131_071)):
        cache.keys[1][row, 7, position] = 1
        cache.values[1][row, 7, position] = 2
    assert float(cache.keys[1][255, 7, 131_071].sum()) == 512
    assert resident_bytes() - before < 8 << 20
