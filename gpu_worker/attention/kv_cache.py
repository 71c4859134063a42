"""Rows of running requests and the pages of keys and values they hold, within a stated budget."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gpu_worker.step.attention_plan import AttentionPlan, Segment


@dataclass(frozen=True, slots=True)
class KvShape:
    """How many tokens' keys and values are kept, of what size, for at most how many rows."""

    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    num_rows: int
    max_len: int  # tokens of one row
    num_tokens: int  # of all rows together
    page_tokens: int

    @property
    def token_bytes(self) -> int:
        return self.num_layers * 2 * self.num_heads * self.head_dim * self.dtype.itemsize

    @property
    def num_pages(self) -> int:
        return self.pages_of(self.num_tokens)

    def pages_of(self, num_tokens: int) -> int:
        """Pages that hold so many tokens of one row."""
        return -(-num_tokens // self.page_tokens)


class KvCache(ABC):
    """Who holds which row and pages. A row that has joined grows page by page, up to its own longest length."""

    def __init__(self, shape: KvShape) -> None:
        self.shape = shape
        self._free_rows = list(range(shape.num_rows))  # a heap: low rows first, so that rows lie close together
        self._free_pages = list(range(shape.num_pages))
        self.num_freed = 0  # rows, since the start: while it stays the same, no room was gained
        self._pages: dict[int, list[int]] = {}  # by row, in the order of its tokens
        self._most_pages: dict[int, int] = {}  # by row, at its longest length

    @property
    def num_free(self) -> int:
        """Rows that may join."""
        return len(self._free_rows)

    @property
    def num_free_tokens(self) -> int:
        return len(self._free_pages) * self.shape.page_tokens

    @property
    def num_bytes(self) -> int:
        """What the whole budget takes."""
        return self.shape.num_pages * self.shape.page_tokens * self.shape.token_bytes

    def fits(self, num_tokens: int) -> bool:
        """Whether a row of so many tokens may join now and every row that still grows could have one page more.

        Without that page the rows would grow at the cost of the one that has just joined.
        """
        num_growing = sum(len(pages) < self._most_pages[row] for row, pages in self._pages.items())
        return bool(self._free_rows) and self.shape.pages_of(num_tokens) + num_growing <= len(self._free_pages)

    def allocate(self, num_tokens: int, longest_len: int) -> int:
        """The row, which now holds pages for `num_tokens`. Only for what `fits`."""
        row = heapq.heappop(self._free_rows)
        self._pages[row], self._most_pages[row] = [], self.shape.pages_of(longest_len)
        is_grown = self.grow(row, num_tokens)
        assert is_grown, "whoever joins fits"
        return row

    def grow(self, row: int, num_tokens: int) -> bool:
        """Whether the row holds pages for `num_tokens`; False where too few are free, and nothing has changed."""
        pages = self._pages[row]
        num_missing = self.shape.pages_of(num_tokens) - len(pages)
        if num_missing > len(self._free_pages):
            return False
        for _ in range(num_missing):
            pages.append(self._free_pages.pop())
        return True

    def free(self, row: int) -> None:
        """The row and its pages are free, and wiped: not even NaN reaches whoever comes next."""
        pages = self._pages.pop(row)
        del self._most_pages[row]
        self._wipe(row, pages)
        self.num_freed += 1
        self._free_pages += pages
        heapq.heappush(self._free_rows, row)

    @abstractmethod
    def attention(self, segments: Sequence[Segment]) -> AttentionPlan:
        """The plan for `segments`, which cover a step's tokens in order; their rows hold pages for them."""

    @abstractmethod
    def _wipe(self, row: int, pages: Sequence[int]) -> None:
        """Zero what the row has written."""
