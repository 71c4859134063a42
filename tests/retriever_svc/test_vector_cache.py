from __future__ import annotations

import numpy as np

from retriever_svc.vector_cache import VectorCache


def row(value: float) -> np.ndarray:
    return np.full(3, value, np.float32)


def test_the_least_recently_used_text_is_dropped_first() -> None:
    cache = VectorCache(2)
    cache.put({"a": row(1), "b": row(2)})
    cache.get(["a"])
    cache.put({"c": row(3)})
    found = cache.get(["a", "b", "c"])
    assert set(found) == {"a", "c"}
    np.testing.assert_array_equal(found["a"], row(1))


def test_more_than_fits_keeps_the_last() -> None:
    cache = VectorCache(2)
    cache.put({name: row(0) for name in "abcde"})
    assert set(cache.get("abcde")) == {"d", "e"}


def test_a_cache_of_none_keeps_none() -> None:
    cache = VectorCache(0)
    cache.put({"a": row(1)})
    assert cache.get(["a"]) == {}


def test_what_is_kept_does_not_follow_its_batch() -> None:
    cache, batch = VectorCache(2), np.ones((2, 3), np.float32)
    cache.put({"a": batch[0]})
    batch[:] = 7
    np.testing.assert_array_equal(cache.get(["a"])["a"], row(1))
