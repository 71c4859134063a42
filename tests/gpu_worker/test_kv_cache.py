"""Regions of keys and values."""

from __future__ import annotations

import torch

from gpu_worker.kv_cache import KvCache


def cache_of(num_rows: int = 3) -> KvCache:
    return KvCache(num_layers=2, num_rows=num_rows, num_heads=2, max_len=5, head_dim=4, dtype=torch.float32)


def test_the_lowest_free_row_is_given_out() -> None:
    cache = cache_of()
    assert [cache.allocate() for _ in range(3)] == [0, 1, 2]
    assert cache.num_free == 0
    cache.free(0, 0)
    cache.free(2, 0)
    assert [cache.allocate(), cache.allocate()] == [0, 2]


def test_tokens_are_written_to_their_row_and_position_only() -> None:
    cache = cache_of()
    rows, positions = torch.tensor([0, 2, 2]), torch.tensor([4, 0, 1])
    key, value = torch.randn(2, 3, 4), torch.randn(2, 3, 4)  # (H, N, D)
    cache.write(1, rows, positions, key, value)
    expected_keys, expected_values = torch.zeros(3, 2, 5, 4), torch.zeros(3, 2, 5, 4)
    for token, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        for head in range(2):
            expected_keys[row, head, position] = key[head, token]
            expected_values[row, head, position] = value[head, token]
    torch.testing.assert_close(cache.keys[1], expected_keys)
    torch.testing.assert_close(cache.values[1], expected_values)
    assert not cache.keys[0].any() and not cache.values[0].any()


def test_a_freed_row_is_wiped_and_the_others_are_not() -> None:
    cache = cache_of()
    for stored in (*cache.keys, *cache.values):
        stored[:2, :, :3] = float("nan")
    cache.allocate()
    cache.free(0, 3)
    for stored in (*cache.keys, *cache.values):
        assert not stored[0].any()
        assert bool(stored[1, :, :3].isnan().all())


def test_its_size_is_two_tensors_a_layer() -> None:
    assert cache_of().num_bytes == 2 * 2 * (3 * 2 * 5 * 4) * 4
