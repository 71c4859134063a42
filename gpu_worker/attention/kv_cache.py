"""Allocate rows and pages of keys and values to running requests, within a budget."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gpu_worker.step.attention_plan import AttentionPlan, Segment


@dataclass(frozen=True, slots=True)
class KvShape:
    """The size of a cache: layers, heads, dtype, rows and tokens."""

    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    num_rows: int
    max_len: int  # tokens per row
    num_tokens: int  # of all rows together, the budget
    page_tokens: int

    @property
    def token_bytes(self) -> int:
        return self.num_layers * 2 * self.num_heads * self.head_dim * self.dtype.itemsize

    @property
    def num_pages(self) -> int:
        return self.pages_of(self.num_tokens)

    def pages_of(self, num_tokens: int) -> int:
        """Return the number of pages that `num_tokens` tokens of one row need."""
        return -(-num_tokens // self.page_tokens)


class KvCache(ABC):
    """The allocator of rows and pages. An allocated row grows page by page up to its longest length."""

    def __init__(self, shape: KvShape) -> None:
        self.shape = shape
        self._free_rows = list(range(shape.num_rows))  # a heap: low rows first, so that used rows stay adjacent
        self._free_pages = list(range(shape.num_pages))
        self.num_freed = 0  # rows freed since the start; unchanged means that no capacity was gained
        self._pages: dict[int, list[int]] = {}  # row -> page ids, in token order
        self._most_pages: dict[int, int] = {}  # row -> pages at its longest length

    @property
    def num_free(self) -> int:
        """Return the number of rows that can be allocated."""
        return len(self._free_rows)

    @property
    def num_free_tokens(self) -> int:
        return len(self._free_pages) * self.shape.page_tokens

    @property
    def num_bytes(self) -> int:
        """Return the size of the whole budget."""
        return self.shape.num_pages * self.shape.page_tokens * self.shape.token_bytes

    def fits(self, num_tokens: int) -> bool:
        """Return whether a row of `num_tokens` can be allocated with one spare page left for every growing row.

        Without the spare pages the growing rows would soon preempt the new one.
        """
        num_growing = sum(len(pages) < self._most_pages[row] for row, pages in self._pages.items())
        return bool(self._free_rows) and self.shape.pages_of(num_tokens) + num_growing <= len(self._free_pages)

    def allocate(self, num_tokens: int, longest_len: int) -> int:
        """Allocate a row with pages for `num_tokens` and return it. The caller has checked `fits`."""
        row = heapq.heappop(self._free_rows)
        self._pages[row], self._most_pages[row] = [], self.shape.pages_of(longest_len)
        is_grown = self.grow(row, num_tokens)
        assert is_grown, "callers check fits() first"
        return row

    def grow(self, row: int, num_tokens: int) -> bool:
        """Give the row pages for `num_tokens`. Return False, and change nothing, if too few pages are free."""
        pages = self._pages[row]
        num_missing = self.shape.pages_of(num_tokens) - len(pages)
        if num_missing > len(self._free_pages):
            return False
        for _ in range(num_missing):
            pages.append(self._free_pages.pop())
        return True

    def free(self, row: int) -> None:
        """Free the row and zero its pages, so that NaN values cannot reach the next owner."""
        pages = self._pages.pop(row)
        del self._most_pages[row]
        self._wipe(row, pages)
        self.num_freed += 1
        self._free_pages += pages
        heapq.heappush(self._free_rows, row)

    @abstractmethod
    def attention(self, segments: Sequence[Segment]) -> AttentionPlan:
        """Return the plan for `segments`, which cover the step's tokens in order. Their rows have pages for them."""

    @abstractmethod
    def _wipe(self, row: int, pages: Sequence[int]) -> None:
        """Zero the keys and values of the row."""
