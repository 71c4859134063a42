"""Arrays that only ever grow, so that every generation of an index can share them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_SPARE_ROWS = 1024


class GrowingArray:
    """Rows that are appended and never changed. One writer; readers keep the views they took, whatever is added.

    It outgrows its memory by a quarter each time, so that a row is copied a bounded number of times.
    """

    def __init__(self, dtype: DTypeLike, row_shape: tuple[int, ...] = (), *, num_rows: int = 0) -> None:
        """Empty, with room for `num_rows` and some more."""
        self._rows: NDArray[Any] = np.empty((_capacity(num_rows), *row_shape), dtype)
        self._num_rows = 0

    def __len__(self) -> int:
        return self._num_rows

    @property
    def num_bytes(self) -> int:
        return self._rows.nbytes

    def append(self, rows: NDArray[Any]) -> None:
        end = self._num_rows + len(rows)
        if end > len(self._rows):
            grown = np.empty((_capacity(end), *self._rows.shape[1:]), self._rows.dtype)
            grown[: self._num_rows] = self._rows[: self._num_rows]
            self._rows = grown
        self._rows[self._num_rows : end] = rows
        self._num_rows = end  # last: a reader in another thread never sees a row that is not written yet

    def view(self) -> NDArray[Any]:
        """All rows appended so far."""
        num_rows = self._num_rows  # first: the array may be replaced by a longer one, never by a shorter
        return self._rows[:num_rows]


def _capacity(num_rows: int) -> int:
    return num_rows + num_rows // 4 + _SPARE_ROWS
