"""Append-only arrays, which all generations of an index can share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_SPARE_ROWS = 1024


class AppendOnlyArray:
    """Rows that are appended and never changed. There is one writer; the views of readers stay valid.

    The capacity grows by a quarter at a time, so each row is copied a bounded number of times.
    """

    def __init__(self, dtype: DTypeLike, row_shape: tuple[int, ...] = (), *, num_rows: int = 0) -> None:
        """Create an empty array with room for at least `num_rows`."""
        self._rows: NDArray[Any] = np.empty((_capacity(num_rows), *row_shape), dtype)
        self._num_rows = 0

    def __len__(self) -> int:
        return self._num_rows

    @property
    def num_bytes(self) -> int:
        return self._rows.nbytes

    def append(self, rows: NDArray[Any]) -> None:
        """Append the rows."""
        end = self._num_rows + len(rows)
        if end > len(self._rows):
            grown = np.empty((_capacity(end), *self._rows.shape[1:]), self._rows.dtype)
            grown[: self._num_rows] = self._rows[: self._num_rows]
            self._rows = grown
        self._rows[self._num_rows : end] = rows
        self._num_rows = end  # set last, so that readers in other threads see only complete rows

    def view(self) -> NDArray[Any]:
        """Return all rows appended so far."""
        num_rows = self._num_rows  # read first: the array may only be replaced by a longer one
        return self._rows[:num_rows]


def _capacity(num_rows: int) -> int:
    return num_rows + num_rows // 4 + _SPARE_ROWS
