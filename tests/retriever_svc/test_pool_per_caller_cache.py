from __future__ import annotations

from retriever_svc.pool import PerCallerCache


def test_a_value_is_computed_once_per_caller() -> None:
    cache: PerCallerCache[int] = PerCallerCache()
    computed = []
    for key in [("a",), ("a", "tag"), ("a",), ("a", "tag")]:
        assert cache.get(key, lambda key=key: computed.append(key) or len(key)) == len(key)
    assert computed == [("a",), ("a", "tag")]


def test_ever_new_tags_do_not_fill_the_memory() -> None:
    cache: PerCallerCache[int] = PerCallerCache()
    cache.get(("kept",), lambda: -1)
    for number in range(2000):
        cache.get(("t", f"tag-{number}"), lambda number=number: number)
        assert cache.get(("kept",), lambda: -2) == -1
    assert len(cache._values) <= 256
