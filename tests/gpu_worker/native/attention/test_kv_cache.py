"""Rows and pages: admission, growth, and release.

Prefixes in the KV cache, compared with a slow reference: a dictionary of token tuples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from zlib import crc32

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.front.prefix import Prefix
from gpu_worker.model.attention_plan import Segment
from gpu_worker.native.attention.kv_cache import KvCache, KvShape
from gpu_worker.native.attention.kv_pages import DeviceKvCache, HostKvCache
from tests.gpu_worker.engine_driver import kv_shape
from tests.gpu_worker.poisoned_cache import Poisoned

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


PAGE, MAX_LEN, ROWS, WINDOW = 2, 16, 4, 5
WINDOWS = {"window": WINDOW, "window_layers": frozenset({0, 2})}
PLANS = ("", "x", "xy")  # namespaces, and the weights that compute them


def small_cache(num_tokens: int, *, num_window_tokens: int = 0, **changes: object) -> Poisoned:
    sizes = {"num_layers": 3, "num_heads": 1, "head_dim": 1, "num_rows": ROWS, "max_len": MAX_LEN, "kept_share": 1.0}
    return Poisoned(
        kv_shape(**{**sizes, **changes}, num_tokens=num_tokens, num_window_tokens=num_window_tokens, page_tokens=PAGE)
    )


def code(plan: str, tokens: Sequence[int]) -> float:
    """Return the value that the last of these tokens has under the plan. It depends on all of them."""
    return float(crc32(repr((plan, list(tokens))).encode()) % (1 << 20) + 1)


@dataclass
class Reference:
    """Everything that was computed, by plan and tokens, and the rows."""

    cache: HostKvCache
    blocks: dict[str, set[tuple[int, ...]]] = field(default_factory=lambda: {plan: set() for plan in PLANS})
    rows: dict[int, tuple[str, list[int], int]] = field(default_factory=dict)  # row -> plan, tokens, computed tokens

    def longest(self, plan: str, tokens: Sequence[int]) -> int:
        """Return the computed tokens in whole blocks at the start of `tokens`, without the last token."""
        ends = range(PAGE, len(tokens), PAGE)
        return max((end for end in ends if tuple(tokens[:end]) in self.blocks[plan]), default=0)

    def join(self, plan: str, tokens: list[int], longest_len: int, *, exactly: bool) -> None:
        prefix = Prefix(tokens, plan.encode(), plan, PAGE)
        if not self.cache.fits(len(tokens), prefix):
            return
        row = self.cache.allocate(len(tokens), longest_len, prefix)
        reused, longest = self.cache.num_reused(row), self.longest(plan, tokens)
        assert reused == longest if exactly else reused <= longest
        self.rows[row] = plan, tokens, reused
        self.check(row)

    def compute(self, row: int, num_tokens: int) -> None:
        """Write the next tokens of the row, as a step does."""
        plan, tokens, done = self.rows[row]
        end = min(done + num_tokens, len(tokens))
        if end == done:
            return
        values = torch.tensor([[[code(plan, tokens[: i + 1])] for i in range(done, end)]])
        attention = self.cache.attention([Segment(row, 0, end - done, done)])
        for layer in range(3):
            window = WINDOW if layer in self.cache.shape.window_layers else None
            attention.attend(layer, torch.zeros_like(values), values, values, scaling=1.0, sliding_window=window)
        self.check(row, end)
        self.cache.computed(row, end)
        self.rows[row] = plan, tokens, end
        self.blocks[plan].update(tuple(tokens[:stop]) for stop in range(PAGE, end + 1, PAGE))
        self.check(row)

    def check(self, row: int, num_computed: int | None = None) -> None:
        """Check the keys and values of all tokens that the row's next token sees."""
        plan, tokens, done = self.rows[row]
        groups = self.cache.attention([Segment(row, 0, 1, 0)]).groups
        for layer, group in enumerate(groups):
            window = group.pages.window
            first = 0 if window is None else max(0, done + 1 - window)
            slots = group.pages.slots(torch.tensor(row), torch.arange(first, num_computed or done))
            expected = [code(plan, tokens[: i + 1]) for i in range(first, num_computed or done)]
            for stored in (self.cache.keys[layer], self.cache.values[layer]):
                assert stored[0, slots, 0].tolist() == expected

    def leave(self, row: int) -> None:
        self.cache.free(row)
        del self.rows[row]

    def forget(self, digest: str) -> None:
        """Forget weights that no row uses."""
        if not any(digest in plan for plan, _, _ in self.rows.values()):
            self.cache.forget([digest])
            for plan in PLANS:
                if digest in plan:
                    self.blocks[plan].clear()


@pytest.mark.parametrize("windows", [{}, WINDOWS], ids=["whole rows", "windows"])
@pytest.mark.parametrize("is_ample", [True, False], ids=["ample", "scarce"])
@given(data=st.data())
def test_rows_find_what_was_computed_and_nothing_else(
    windows: dict[str, object], is_ample: bool, data: st.DataObject
) -> None:
    """With ample pages a row finds all of it. With few pages it finds a part, whose values are right."""
    num_tokens = 4000 if is_ample else 24
    num_window_tokens = (4000 if is_ample else 24) if windows else 0
    cache = small_cache(num_tokens, num_window_tokens=num_window_tokens, **windows)
    reference = Reference(cache)
    for _ in range(data.draw(st.integers(1, 30))):
        kinds = ["join", "join", "forget"] + (["compute", "compute", "append", "leave"] if reference.rows else [])
        kind = data.draw(st.sampled_from(kinds))
        row = data.draw(st.sampled_from(sorted(reference.rows))) if reference.rows else -1
        if kind == "join":
            plan = data.draw(st.sampled_from(PLANS))
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=MAX_LEN - 1))
            reference.join(plan, tokens, MAX_LEN, exactly=is_ample)
        elif kind == "compute":
            reference.compute(row, data.draw(st.integers(1, MAX_LEN)))
        elif kind == "append":
            _, tokens, done = reference.rows[row]
            if done == len(tokens) < MAX_LEN and cache.grow(row, done + 1):
                tokens.append(data.draw(st.integers(0, 1)))
        elif kind == "leave":
            reference.leave(row)
        else:
            reference.forget(data.draw(st.sampled_from("xy")))
        for each in reference.rows:
            reference.check(each)
    for row in list(reference.rows):
        reference.leave(row)
    assert (cache.num_free, cache.num_free_tokens) == (ROWS, num_tokens)
    cache.forget()
    assert cache.num_cached_tokens == 0
    assert all(bool(store.isnan().all()) for store in cache.stores), "every page that nothing needs is wiped"


def joined(reference: Reference, tokens: list[int], plan: str = "") -> int:
    """Let a row join and compute all its tokens."""
    before = set(reference.rows)
    reference.join(plan, tokens, MAX_LEN, exactly=False)
    [row] = set(reference.rows) - before
    reference.compute(row, MAX_LEN)
    return row


def test_a_row_starts_in_a_window_layer_only_where_its_window_is_cached() -> None:
    """The window layers have four pages: the last row's window takes three, so one of the first row's is left."""
    reference = Reference(small_cache(64, num_window_tokens=8, **WINDOWS))
    reference.leave(joined(reference, [1] * 8))
    reference.leave(joined(reference, [2] * 8))
    for token in (2, 1):
        tokens = [token] * 9
        reference.join("", tokens, MAX_LEN, exactly=False)
        [row] = reference.rows
        assert reference.cache.num_reused(row) == (8 if token == 2 else 0)
        reference.leave(row)
    assert reference.cache.num_cached_tokens == 16, "the other layers have both prompts"


def test_a_row_in_window_layers_holds_its_window_only() -> None:
    cache = small_cache(64, num_window_tokens=64, **WINDOWS, kept_share=0.0)
    reference = Reference(cache)
    row = joined(reference, [1] * 3)
    for length in range(4, MAX_LEN + 1):
        _, tokens, _ = reference.rows[row]
        assert cache.grow(row, length)
        tokens.append(1)
        reference.compute(row, 1)
        held = [bool(store.isfinite().any((0, 1, 2, 4, 5)).sum()) for store in cache.stores]
        assert held == [True, True]
        num_pages = [int(store.isfinite().all((0, 1, 2, 5)).any(-1).sum()) for store in cache.stores]
        assert num_pages[0] == -(-length // PAGE) and num_pages[1] <= WINDOW // PAGE + 1


def test_a_row_that_fits_does_not_count_kept_pages_that_it_takes() -> None:
    reference = Reference(small_cache(16))
    reference.leave(joined(reference, [1] * 8))
    other = joined(reference, [2] * 6)
    prefix = Prefix([1] * 12, b"", (), PAGE)
    assert reference.cache.num_free_tokens == 10
    assert not reference.cache.fits(12, prefix), "four kept pages and two free ones, one of them for the other row"
    reference.leave(other)
    assert reference.cache.fits(12, prefix)


def waits(cache: HostKvCache, tokens: list[int], plan: str = "") -> bool:
    return cache.is_coming(len(tokens), Prefix(tokens, plan.encode(), plan, PAGE))


def test_a_row_waits_for_a_prompt_that_is_being_computed() -> None:
    reference = Reference(small_cache(600, max_len=200))
    tokens = [1] * 100
    reference.join("", tokens, 120, exactly=True)
    [row], cache = reference.rows, reference.cache
    assert waits(cache, [1] * 66) and waits(cache, [1] * 150) and waits(cache, [*[1] * 70, 2])
    assert not waits(cache, [1] * 64), "63 tokens can be reused: not worth it"
    assert not waits(cache, [2, *[1] * 99]) and not waits(cache, [1] * 100, "x")
    num_freed = cache.num_freed
    reference.compute(row, 40)
    assert not waits(cache, [1] * 100), "the rest is not worth it"
    assert cache.num_freed == num_freed, "awaited blocks are still missing"
    reference.compute(row, 60)
    assert cache.num_freed > num_freed


def test_no_row_waits_for_one_that_left() -> None:
    reference = Reference(small_cache(600, max_len=200))
    reference.join("", [1] * 100, 120, exactly=True)
    [row] = reference.rows
    assert waits(reference.cache, [1] * 100)
    reference.leave(row)
    assert not waits(reference.cache, [1] * 100)


def test_a_distrusted_row_leaves_nothing_behind() -> None:
    reference = Reference(small_cache(64, num_window_tokens=64, **WINDOWS))
    kept = joined(reference, [2] * 6)
    first = joined(reference, [1] * 9)
    second = joined(reference, [1] * 12)
    reference.cache.distrust(second)
    reference.cache.computed(second, 12)
    reference.leave(second)
    reference.leave(first)
    reference.leave(kept)
    for tokens, found in (([1] * 12, 0), ([2] * 7, 6)):
        reference.join("", tokens, MAX_LEN, exactly=False)
        [row] = reference.rows
        assert reference.cache.num_reused(row) == found
        reference.leave(row)
