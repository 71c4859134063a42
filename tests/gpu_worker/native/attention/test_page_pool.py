"""Holders, keys and eviction of pages."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_worker.native.attention.page_pool import PagePool


class Wiped(list[int]):
    """Records wiped pages."""

    def __call__(self, pages: Sequence[int]) -> None:
        self.extend(pages)


def taken(pool: PagePool, num_pages: int) -> list[int]:
    pages = pool.take(num_pages)
    assert pages is not None
    return pages


def registered(pool: PagePool, *keys: bytes, digests: Sequence[str] = ()) -> list[int]:
    """Take a page for each key and register it."""
    pages = taken(pool, len(keys))
    for page, key in zip(pages, keys, strict=True):
        assert pool.register(page, key, digests) == page
    return pages


def test_a_page_without_a_key_is_wiped_and_free_when_its_row_leaves() -> None:
    pool = PagePool(3, 3, wiped := Wiped())
    pages = taken(pool, 2)
    assert pages == [0, 1] and pool.num_available == 1 and pool.take(2) is None
    pool.release(pages)
    assert sorted(wiped) == [0, 1] and pool.num_available == 3
    assert taken(pool, 3) == [0, 1, 2], "adjacent again"


def test_a_page_with_a_key_is_kept_until_its_room_is_needed() -> None:
    pool = PagePool(3, 3, wiped := Wiped())
    pages = registered(pool, b"a", b"b")
    pool.release(pages)
    assert (wiped, pool.num_available, pool.num_cached) == ([], 3, 2)
    assert [pool.find(b"a"), pool.find(b"b"), pool.find(b"c")] == [*pages, None]
    taken(pool, 2)
    assert wiped == [pages[1]] and pool.find(b"b") is None, "the later block first"
    assert pool.find(b"a") == pages[0] and pool.num_evicted == 1


def test_the_least_recently_used_page_is_evicted_first() -> None:
    pool = PagePool(3, 3, Wiped())
    a, b, c = registered(pool, b"a", b"b", b"c")
    for page in (b, a, c):
        pool.release([page])
    pool.hold(b)
    pool.release([b])  # used again
    for gone in (b"a", b"c", b"b"):
        assert pool.find(gone) is not None
        taken(pool, 1)
        assert pool.find(gone) is None


def test_a_held_page_is_never_evicted() -> None:
    pool = PagePool(3, 3, wiped := Wiped())
    [a] = registered(pool, b"a")
    pool.hold(a)
    pool.release([a])  # one holder is left
    assert taken(pool, 2) and pool.take(1) is None
    assert pool.find(b"a") == a and wiped == [] and not pool.is_kept(a)
    pool.release([a])
    assert pool.is_kept(a) and taken(pool, 1) == [a] and wiped == [a]


def test_no_more_pages_are_kept_than_allowed() -> None:
    pool = PagePool(4, 1, wiped := Wiped())
    pages = registered(pool, b"a", b"b", b"c")
    pool.release(pages)
    assert wiped == [pages[2], pages[1]] and pool.find(b"a") == pages[0]
    assert (pool.num_available, pool.num_cached, pool.num_evicted) == (4, 1, 2)


def test_one_page_of_two_equal_blocks_stays() -> None:
    pool = PagePool(3, 3, wiped := Wiped())
    first, second = taken(pool, 2)
    assert pool.register(first, b"a", ()) == pool.register(second, b"a", ()) == first
    assert wiped == [second] and pool.num_available == 2
    pool.release([first])
    assert not pool.is_kept(first), "the other row holds it too"
    pool.release([first])
    assert pool.is_kept(first) and pool.num_available == 3


def test_forgotten_weights_leave_no_page() -> None:
    pool = PagePool(4, 4, wiped := Wiped())
    base, one, both = (
        registered(pool, b"base"),
        registered(pool, b"x", digests="x"),
        registered(pool, b"xy", digests="xy"),
    )
    pool.release([*base, *one, *both])
    pool.forget(frozenset("y"))
    assert wiped == both and pool.find(b"xy") is None
    pool.forget(frozenset("x"))
    assert wiped == [*both, *one] and pool.find(b"base") == base[0]
    pool.forget(None)
    assert pool.num_cached == 0 and pool.num_available == 4


def test_a_held_page_that_loses_its_key_is_wiped_when_its_row_leaves() -> None:
    pool = PagePool(2, 2, wiped := Wiped())
    pages = registered(pool, b"a")
    pool.unregister(pages)
    assert wiped == [] and pool.find(b"a") is None and pool.num_available == 1
    pool.release(pages)
    assert wiped == pages and pool.num_available == 2
