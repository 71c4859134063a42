"""Rows and pages: admission, growth, and release."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gpu_worker.native.attention.kv_cache import KvCache, KvShape
from gpu_worker.native.attention.kv_pages import DeviceKvCache, HostKvCache
from tests.gpu_worker.engine_driver import kv_shape

Build = Callable[[KvShape], KvCache]
BUILDS: list[Build] = [HostKvCache, lambda shape: DeviceKvCache(shape, torch.device("cpu"))]
either = pytest.mark.parametrize("build", BUILDS, ids=["host", "device"])


@either
def test_the_lowest_free_row_is_allocated(build: Build) -> None:
    cache = build(kv_shape())
    assert [cache.allocate(1, 1) for _ in range(3)] == [0, 1, 2]
    assert cache.num_free == 0
    cache.free(0)
    cache.free(2)
    assert [cache.allocate(1, 1), cache.allocate(1, 1)] == [0, 2]


@either
def test_a_row_takes_whole_pages_as_it_grows(build: Build) -> None:
    cache = build(kv_shape(num_tokens=40, page_tokens=4, max_len=20))
    row = cache.allocate(5, 20)
    free = [cache.num_free_tokens]
    for num_tokens in range(6, 14):
        assert cache.grow(row, num_tokens)
        free.append(cache.num_free_tokens)
    assert free == [32, 32, 32, 32, 28, 28, 28, 28, 24]
    cache.free(row)
    assert cache.num_free_tokens == 40


@either
def test_a_row_that_cannot_grow_keeps_its_pages(build: Build) -> None:
    cache = build(kv_shape(num_tokens=16, page_tokens=4, max_len=16))
    first, second = cache.allocate(8, 16), cache.allocate(4, 16)
    assert cache.grow(first, 12)
    assert not cache.grow(second, 5) and cache.num_free_tokens == 0
    cache.free(first)
    assert cache.grow(second, 16)


@either
def test_a_new_row_leaves_a_page_for_each_growing_row(build: Build) -> None:
    cache = build(kv_shape(num_tokens=24, page_tokens=4, max_len=16))
    cache.allocate(8, 16)
    cache.allocate(4, 4)  # as long as it gets
    assert cache.fits(8) and not cache.fits(9)
    assert cache.grow(0, 16)
    assert cache.fits(4) and not cache.fits(5), "no row grows any more"
    cache.allocate(4, 4)
    assert not cache.fits(0), "no row is free"


@either
def test_any_row_fits_an_empty_cache(build: Build) -> None:
    cache = build(kv_shape(num_tokens=10, page_tokens=4, max_len=10))
    assert cache.fits(10)
    row = cache.allocate(10, 10)
    assert cache.num_free_tokens == 0
    cache.free(row)
    assert cache.fits(10)


@either
def test_its_size_is_that_of_its_pages(build: Build) -> None:
    assert build(kv_shape(num_tokens=7, page_tokens=4)).num_bytes == 8 * (2 * 2 * 2 * 4 * 4)
