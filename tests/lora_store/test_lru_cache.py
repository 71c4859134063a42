from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_store.lru_cache import LruCache


@pytest.mark.parametrize(("keeps_newest", "kept"), [(False, ["small"]), (True, ["large"])])
def test_a_value_larger_than_the_cache_is_kept_only_on_request(keeps_newest: bool, kept: list[str]) -> None:
    cache: LruCache[str, str] = LruCache(3, len, keeps_newest=keeps_newest)
    cache.put("small", "abc")
    cache.put("large", "abcd")
    assert list(cache.keys()) == kept
    assert cache.total == sum(len(cache.get(key) or "") for key in kept)


def test_a_value_is_measured_once() -> None:
    measured: list[str] = []

    def measure(value: str) -> int:
        measured.append(value)
        return 1

    cache: LruCache[int, str] = LruCache(2, measure)
    for number in range(5):
        cache.put(number, str(number))
        cache.get(number)
    assert measured == list("01234")


@given(st.lists(st.tuples(st.sampled_from(["get", "put", "pop"]), st.integers(0, 4), st.integers(0, 6))))
def test_it_equals_a_slow_list(steps: list[tuple[str, int, int]]) -> None:
    cache: LruCache[int, int] = LruCache(10, int)
    slow: list[tuple[int, int]] = []  # (key, value), least recently used first; a value is its own size
    for step, key, value in steps:
        old = [item for item in slow if item[0] == key]
        rest = [item for item in slow if item[0] != key]
        act: Callable[[int], int | None] = cache.get if step == "get" else cache.pop
        if step == "put":
            cache.put(key, value)
            slow = [*rest, (key, value)]
            while sum(size for _, size in slow) > 10:
                del slow[0]
        else:
            assert act(key) == (old[0][1] if old else None)
            slow = [*rest, *old] if step == "get" else rest
        assert list(cache.keys()) == [item[0] for item in slow] and len(cache) == len(slow)
        assert cache.total == sum(size for _, size in slow)
