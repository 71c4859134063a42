from __future__ import annotations

import numpy as np
import pytest

from retriever_svc.vector_cache import VectorCache


def row(value: float) -> np.ndarray:
    return np.full(3, value, np.float32)


def mine(*texts: str) -> list[tuple[str, str]]:
    return [("me", text) for text in texts]


def test_the_least_recently_used_text_is_dropped_first() -> None:
    cache, batch = VectorCache(2), np.stack([row(1), row(2)])
    cache.put({("me", "a"): batch[0], ("me", "b"): batch[1]})
    batch[:] = 7  # which no cached vector follows
    cache.get(mine("a"))
    cache.put({("me", "c"): row(3)})
    found = cache.get(mine("a", "b", "c"))
    assert set(found) == set(mine("a", "c"))
    np.testing.assert_array_equal(found["me", "a"], row(1))
    cache.put({key: row(0) for key in mine(*"abcde")})
    assert set(cache.get(mine(*"abcde"))) == set(mine(*"de")), "of more than fits the last are kept"
    empty = VectorCache(0)
    empty.put({("me", "a"): row(1)})
    assert empty.get(mine("a")) == {}


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


@pytest.mark.parametrize("is_put", [True, False])
def test_the_least_recently_used_owner_is_dropped_with_all_its_texts(is_put: bool) -> None:
    cache = VectorCache(2, max_owners=2)
    for owner in "ab":
        cache.put({(owner, "text"): row(0)})
    if is_put:
        cache.put({("a", "text"): row(0)})
    else:
        cache.get([("a", "text")])
    cache.put({("c", "text"): row(0)})
    assert set(cache.get([(owner, "text") for owner in "abc"])) == {("a", "text"), ("c", "text")}
