"""Allocate rows and pages of keys and values to running requests, within a budget.

Pages of full blocks whose tokens have been computed stay behind as prefixes for later rows (`Prefix` has their keys).
Layers with a sliding window have pages of their own, and a row holds only those of its window. So a row can start
behind n cached blocks if the other layers have all n, and the sliding layers those that token n * page_tokens sees.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from gpu_worker.front.prefix import Prefix
from gpu_worker.model.attention_plan import AttentionPlan, Segment
from gpu_worker.native.attention.page_pool import PagePool

_WORTH_WAITING_TOKENS = 64  # a row waits for a running one that computes at least as many tokens of its prompt


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers whose tokens are in the same pages, and the number of these pages."""

    layers: tuple[int, ...]
    window: int | None
    num_pages: int


@dataclass(frozen=True, slots=True)
class KvShape:
    """The size of a cache: layers, heads, dtype, rows and tokens."""

    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    num_rows: int
    max_len: int  # tokens per row
    num_tokens: int  # the budget, for all rows together
    page_tokens: int
    window: int | None = None  # `window_layers` keep no older tokens
    window_layers: frozenset[int] = frozenset()
    num_window_tokens: int = 0  # the budget of these layers
    kept_share: float = 0.0  # largest share of the pages that may keep prefixes while no row holds them

    @property
    def layer_token_bytes(self) -> int:
        """Return the bytes of a token in one layer."""
        return 2 * self.num_heads * self.head_dim * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all pages."""
        num_pages = sum(group.num_pages * len(group.layers) for group in self.groups)
        return num_pages * self.page_tokens * self.layer_token_bytes

    @property
    def num_pages(self) -> int:
        return self.pages_of(self.num_tokens)

    @property
    def groups(self) -> list[LayerGroup]:
        """Return the layers that keep whole rows, and then those that keep a window if there are any."""
        whole = tuple(layer for layer in range(self.num_layers) if layer not in self.window_layers)
        groups = [LayerGroup(whole, None, self.num_pages)]
        if self.window_layers:
            layers = tuple(sorted(self.window_layers))
            groups.append(LayerGroup(layers, self.window, self.pages_of(self.num_window_tokens)))
        return groups

    def pages_of(self, num_tokens: int) -> int:
        """Return the number of pages that `num_tokens` tokens of one row need."""
        return -(-num_tokens // self.page_tokens)


class GroupPages:
    """The pages of one group of layers. Dims: R rows, W pages of the longest row.

    table (R, W) int64: the page of each block. Entries before `first_block` and behind the row's end are meaningless.
    """

    def __init__(self, group: LayerGroup, shape: KvShape, pool: PagePool) -> None:
        self.window, self.pool = group.window, pool
        self.seen = group.window if shape.window_layers else shape.window  # the most tokens that its layers see
        self._page_tokens = shape.page_tokens
        self.table = torch.zeros(shape.num_rows, shape.pages_of(shape.max_len), dtype=torch.int64)
        self._entries = self.table.numpy()  # the same memory
        self._held = [range(0)] * shape.num_rows  # the blocks whose pages the row holds

    def first_block(self, context_len: int) -> int:
        """Return the first block that a token with `context_len` tokens before it sees."""
        return 0 if self.window is None else max(0, context_len + 1 - self.window) // self._page_tokens

    def pages(self, row: int) -> list[int]:
        """Return the pages that the row holds, in token order."""
        held = self._held[row]
        pages: list[int] = self._entries[row, held.start : held.stop].tolist()
        return pages

    def num_blocks(self, row: int) -> int:
        """Return the number of blocks up to the row's last page."""
        return self._held[row].stop

    def join(self, row: int, prefix: Prefix | None, num_blocks: int) -> None:
        """Hold the pages of the first `num_blocks` blocks of the prefix, as far as the next token sees them."""
        held = range(self.first_block(num_blocks * self._page_tokens), num_blocks)
        for block in held:
            page = None if prefix is None else self.pool.find(prefix.key(block))
            assert page is not None, "the caller has found the blocks"
            self.pool.hold(page)
            self._entries[row, block] = page
        self._held[row] = held

    def extend(self, row: int, num_blocks: int) -> bool:
        """Hold pages for all blocks up to `num_blocks`. Return False, and change nothing, if there are too few."""
        held = self._held[row]
        if num_blocks > held.stop:
            pages = self.pool.take(num_blocks - held.stop)
            if pages is None:
                return False
            self._entries[row, held.stop : num_blocks] = pages
            self._held[row] = range(held.start, num_blocks)
        return True

    def register(self, row: int, block: int, prefix: Prefix) -> None:
        """Offer the page of a computed block to other rows, if the row still holds it."""
        if block in self._held[row]:
            page = int(self._entries[row, block])
            self._entries[row, block] = self.pool.register(page, prefix.key(block), prefix.weights_digests)

    def slide(self, row: int, num_tokens: int) -> None:
        """Release the blocks that no token behind the first `num_tokens` sees."""
        held, first = self._held[row], self.first_block(num_tokens)
        if first > held.start:
            self.pool.release(self._entries[row, held.start : first].tolist())
            self._held[row] = range(first, held.stop)

    def free(self, row: int) -> None:
        self.pool.release(self.pages(row))
        self._held[row] = range(0)


class _Holder:
    """The state of a row besides its pages."""

    def __init__(self, num_pages_at_most: int, prefix: Prefix | None, num_cached: int) -> None:
        self.num_pages_at_most, self.prefix = num_pages_at_most, prefix
        self.num_cached = num_cached  # blocks that were found
        self.num_registered = num_cached  # blocks that are in the prefix cache
        self.announced: list[bytes] = []  # keys of blocks that it will register


class KvCache(ABC):
    """The allocator of rows and pages. An allocated row grows page by page up to its longest length."""

    def __init__(self, shape: KvShape) -> None:
        self.shape = shape
        self._free_rows = list(range(shape.num_rows))  # a heap: low rows first, so that used rows stay adjacent
        self.num_freed = 0  # rows freed or awaited blocks ready, since the start; unchanged: no waiting row can start
        self._rows: dict[int, _Holder] = {}
        self._coming: set[bytes] = set()  # keys of blocks that running rows compute
        self._awaited: set[bytes] = set()  # those of them that waiting rows wait for
        self._groups: list[GroupPages] = []
        for index, group in enumerate(shape.groups):
            num_kept = int(shape.kept_share * group.num_pages)
            pool = PagePool(group.num_pages, num_kept, partial(self._wipe, index))
            self._groups.append(GroupPages(group, shape, pool))
        self._main = self._groups[0]

    @property
    def num_free(self) -> int:
        """Return the number of rows that can be allocated."""
        return len(self._free_rows)

    @property
    def num_free_tokens(self) -> int:
        """Return the tokens in pages that no row holds. Kept prefixes among them are evicted on demand."""
        return self._main.pool.num_available * self.shape.page_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Return the tokens in the prefix cache, in pages that rows hold or that are kept."""
        return self._main.pool.num_cached * self.shape.page_tokens

    @property
    def num_evicted(self) -> int:
        """Return the number of blocks evicted from the prefix cache since the start."""
        return self._main.pool.num_evicted

    @property
    def num_bytes(self) -> int:
        """Return the size of the whole budget."""
        return self.shape.num_bytes

    def fits(self, num_tokens: int, prefix: Prefix | None = None) -> bool:
        """Return whether a row of `num_tokens` can be allocated with one spare page left for every growing row.

        Without the spare pages the growing rows would soon preempt the new one.
        """
        pool = self._main.pool
        num_growing = sum(self._main.num_blocks(row) < of.num_pages_at_most for row, of in self._rows.items())
        num_found = self._num_found(num_tokens, prefix)
        found = [] if prefix is None else [pool.find(prefix.key(block)) for block in range(num_found)]
        num_taken = sum(page is not None and pool.is_kept(page) for page in found)
        num_missing = self.shape.pages_of(num_tokens) - num_found
        return bool(self._free_rows) and num_missing + num_growing <= pool.num_available - num_taken

    def allocate(self, num_tokens: int, longest_len: int, prefix: Prefix | None = None) -> int:
        """Allocate a row with pages for `num_tokens` and return it. The caller has checked `fits`.

        The row starts with the blocks of its prefix that are cached: see `num_reused`.
        """
        row = heapq.heappop(self._free_rows)
        num_found = self._num_found(num_tokens, prefix)
        holder = self._rows[row] = _Holder(self.shape.pages_of(longest_len), prefix, num_found)
        for group in self._groups:
            group.join(row, prefix, num_found)
        is_grown = self.grow(row, num_tokens)
        assert is_grown, "callers check fits() first"
        if prefix is not None:
            keys = [prefix.key(block) for block in range(num_found, num_tokens // self.shape.page_tokens)]
            holder.announced = [key for key in keys if key not in self._coming]
            self._coming.update(holder.announced)
        return row

    def pages(self, row: int) -> list[int]:
        """Return the row's pages in the layers that keep whole rows, in token order."""
        return self._main.pages(row)

    def num_reused(self, row: int) -> int:
        """Return the number of tokens that were computed before the row was allocated."""
        return self._rows[row].num_cached * self.shape.page_tokens

    def is_coming(self, num_tokens: int, prefix: Prefix | None) -> bool:
        """Return whether a running row is computing the next tokens of this prefix, so that it pays to wait."""
        if prefix is None:
            return False
        first = self._num_found(num_tokens, prefix)
        num_coming, num_full = 0, (num_tokens - 1) // self.shape.page_tokens
        while first + num_coming < num_full and prefix.key(first + num_coming) in self._coming:
            num_coming += 1
        if num_coming * self.shape.page_tokens < _WORTH_WAITING_TOKENS:
            return False
        self._awaited.add(prefix.key(first + num_coming - 1))
        return True

    def grow(self, row: int, num_tokens: int) -> bool:
        """Give the row pages for `num_tokens`. Return False, and change nothing, if too few pages are free."""
        return self._main.extend(row, self.shape.pages_of(num_tokens))

    def computed(self, row: int, num_tokens: int) -> None:
        """Register the row's full blocks among its first `num_tokens` tokens, and release those behind its window."""
        holder = self._rows[row]
        if holder.prefix is not None:
            for block in range(holder.num_registered, num_tokens // self.shape.page_tokens):
                for group in self._groups:
                    group.register(row, block, holder.prefix)
                self._arrive(holder.prefix.key(block))
                holder.num_registered = block + 1
        for group in self._groups[1:]:
            group.slide(row, num_tokens)

    def distrust(self, row: int) -> None:
        """Remove the row's blocks from the prefix cache, because its values may be wrong."""
        holder = self._rows[row]
        if holder.prefix is not None:
            keys = [holder.prefix.key(block) for block in range(holder.num_registered)]
            for group in self._groups:
                group.pool.unregister([page for page in map(group.pool.find, keys) if page is not None])
        holder.prefix = None

    def free(self, row: int) -> None:
        """Free the row. Pages that are not kept are zeroed, so that NaN values cannot reach the next owner."""
        holder = self._rows.pop(row)
        for group in self._groups:
            group.free(row)
        self.num_freed += 1
        heapq.heappush(self._free_rows, row)
        for key in holder.announced:
            self._arrive(key)

    def forget(self, digests: Collection[str] | None = None) -> None:
        """Remove the blocks that these weights computed from the prefix cache; by default all blocks."""
        for group in self._groups:
            group.pool.forget(None if digests is None else frozenset(digests))

    def attention(self, segments: Sequence[Segment]) -> AttentionPlan:
        """Return the plan for `segments`, which cover the step's tokens in order. Their rows have pages for them."""
        for group in self._groups[1:]:
            for segment in segments:
                is_extended = group.extend(segment.row, self.shape.pages_of(segment.total_len))
                assert is_extended, "the budget of the windows suffices for every step"
        return self._attention(segments)

    def _num_found(self, num_tokens: int, prefix: Prefix | None) -> int:
        """Return the number of cached blocks that a row can start behind. It computes at least its last token."""
        if prefix is None:
            return 0
        num_found, num_full = 0, (num_tokens - 1) // self.shape.page_tokens
        while num_found < num_full and self._main.pool.find(prefix.key(num_found)) is not None:
            num_found += 1
        for group in self._groups[1:]:
            block = num_found - 1
            while block >= group.first_block(num_found * self.shape.page_tokens):
                if group.pool.find(prefix.key(block)) is None:
                    num_found = block  # every later start sees this block too
                block -= 1
        return num_found

    def _arrive(self, key: bytes) -> None:
        """Note that no running row computes this block any more."""
        self._coming.discard(key)
        if key in self._awaited:
            self._awaited.remove(key)
            self.num_freed += 1

    @abstractmethod
    def _attention(self, segments: Sequence[Segment]) -> AttentionPlan:
        """See `attention`. Every row has its pages."""

    @abstractmethod
    def release(self) -> None:
        """Give Linux the host memory of this cache, which holds no row and no prefix, until tokens are written."""

    @abstractmethod
    def _wipe(self, group: int, pages: Sequence[int]) -> None:
        """Zero the keys and values of these pages."""
