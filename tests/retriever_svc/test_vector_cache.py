from __future__ import annotations

import numpy as np

from retriever_svc.vector_cache import VectorCache


def row(value: float) -> np.ndarray:
    return np.full(3, value, np.float32)


def mine(*texts: str) -> list[tuple[str, str]]:
    return [("me", text) for text in texts]


def test_the_least_recently_used_text_is_dropped_first() -> None:
    cache = VectorCache(2)
    cache.put({("me", "a"): row(1), ("me", "b"): row(2)})
    cache.get(mine("a"))
    cache.put({("me", "c"): row(3)})
    found = cache.get(mine("a", "b", "c"))
    assert set(found) == set(mine("a", "c"))
    np.testing.assert_array_equal(found["me", "a"], row(1))


def test_more_than_fits_keeps_the_last() -> None:
    cache = VectorCache(2)
    cache.put({key: row(0) for key in mine(*"abcde")})
    assert set(cache.get(mine(*"abcde"))) == set(mine(*"de"))


def test_a_cache_of_size_zero_keeps_nothing() -> None:
    cache = VectorCache(0)
    cache.put({("me", "a"): row(1)})
    assert cache.get(mine("a")) == {}


def test_a_cached_vector_does_not_follow_its_batch() -> None:
    cache, batch = VectorCache(2), np.ones((2, 3), np.float32)
    cache.put({("me", "a"): batch[0]})
    batch[:] = 7
    np.testing.assert_array_equal(cache.get(mine("a"))["me", "a"], row(1))


def test_texts_of_one_owner_never_answer_another() -> None:
    cache = VectorCache(2)
    cache.put({("me", "a"): row(1), ("you", "a"): row(2)})
    assert cache.get([("them", "a")]) == {}
    found = cache.get([("you", "a"), ("me", "a")])
    np.testing.assert_array_equal([found["me", "a"], found["you", "a"]], [row(1), row(2)])


def test_an_owner_evicts_only_its_own_texts() -> None:
    cache = VectorCache(2)
    cache.put({key: row(0) for key in mine("a", "b")})
    for number in range(10):
        cache.put({("you", f"text {number}"): row(number)})
    assert set(cache.get(mine("a", "b"))) == set(mine("a", "b"))
    assert set(cache.get([("you", "text 8"), ("you", "text 9"), ("you", "text 7")])) == {
        ("you", "text 8"),
        ("you", "text 9"),
    }


def test_a_look_up_marks_its_owner_as_recently_used() -> None:
    cache = VectorCache(2, max_owners=2)
    for owner in "ab":
        cache.put({(owner, "text"): row(0)})
    cache.get([("a", "text")])
    cache.put({("c", "text"): row(0)})
    assert set(cache.get([(owner, "text") for owner in "abc"])) == {("a", "text"), ("c", "text")}


def test_the_least_recently_used_owner_is_dropped_with_all_its_texts() -> None:
    cache = VectorCache(2, max_owners=2)
    for owner in ("a", "b", "a", "c"):
        cache.put({(owner, "text"): row(0)})
    assert set(cache.get([(owner, "text") for owner in "abc"])) == {("a", "text"), ("c", "text")}
