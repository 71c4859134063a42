"""Columns of adapter data by position, shared by all generations of an index."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lora_store.records import AdapterRecord
from lora_store.snapshot import Key
from retriever_svc.encoder import unit_rows

Mask = NDArray[np.bool_]
Positions = NDArray[np.int64]
_BLOCK_ROWS = 8192  # limits the temporary memory of an append
_SPARE_ROWS = 1024
_RECORD_BYTES = 2048  # of an adapter's record without embedding, tags and contract, and of its row without vector
_TAG_BYTES = 256  # of a tag without its characters: in the record, and with a column of its own


class AdapterTable:
    """One row per adapter version, at a position that never changes.

    There is one writer. Readers use only the rows below their own count. `positions`, for the writer only, maps each
    name to the position of its newest version.
    """

    def __init__(self, dim: int, num_rows: int = 0, *, requires_approval: bool = False) -> None:
        """Create an empty table with room for `num_rows` rows of `dim` dimensions."""
        self.dim = dim
        self._requires_approval = requires_approval
        self.records: list[AdapterRecord] = []
        self.positions: dict[Key, int] = {}
        self.vectors = AppendOnlyArray(np.float32, (dim,), num_rows=num_rows)  # unit rows
        self.open = AppendOnlyArray(np.bool_, num_rows=num_rows)  # every tenant may find it
        self._owners = AppendOnlyArray(np.int32, num_rows=num_rows)
        self._owner_codes: dict[str, int] = {}
        self._approved = AppendOnlyArray(np.bool_, num_rows=num_rows)
        self._bases = AppendOnlyArray(np.int32, num_rows=num_rows)
        self._base_codes: dict[str, int] = {}
        self._tagged: dict[str, array[int]] = {}  # positions by tag, ascending
        self.sizes = AppendOnlyArray(np.int64, num_rows=num_rows)  # about how many bytes a row and its record hold

    def __len__(self) -> int:
        return len(self._owners)

    @property
    def num_bytes(self) -> int:
        columns = [self.vectors, self.open, self._owners, self._approved, self._bases, self.sizes]
        tagged = list(self._tagged.values())  # a copy, because the writer may add tags meanwhile
        return sum(column.num_bytes for column in columns) + sum(map(sys.getsizeof, tagged))

    def append(self, records: Sequence[AdapterRecord]) -> None:
        """Add records at the next positions. Each needs a non-zero embedding of `dim` dimensions."""
        for start in range(0, len(records), _BLOCK_ROWS):
            self._append_block(records[start : start + _BLOCK_ROWS])

    def _append_block(self, records: Sequence[AdapterRecord]) -> None:
        embeddings = [record.embedding for record in records if record.embedding is not None]
        assert len(embeddings) == len(records), "every record in the table has an embedding"
        first = len(self)
        self.records.extend(records)
        self.vectors.append(unit_rows(np.stack([embedding.vector for embedding in embeddings])))
        self.open.append(np.asarray([record.is_open(requires_approval=self._requires_approval) for record in records]))
        self._approved.append(np.asarray([record.approved for record in records]))
        self.sizes.append(np.asarray([_estimate_bytes(record) for record in records]))
        self._append_labels(records, first)
        bases = [self._base_codes.setdefault(r.base_model, len(self._base_codes)) for r in records]
        self._bases.append(np.asarray(bases, np.int32))
        codes = [self._owner_codes.setdefault(r.ref.tenant, len(self._owner_codes)) for r in records]
        self._owners.append(np.asarray(codes, np.int32))

    def _append_labels(self, records: Sequence[AdapterRecord], first: int) -> None:
        by_tag: dict[str, list[int]] = {}
        for position, record in enumerate(records, first):
            self.positions[record.ref.tenant, record.ref.name] = position
            for tag in record.tags:
                by_tag.setdefault(tag, []).append(position)
        for tag, positions in by_tag.items():
            if tag in self._tagged:
                self._tagged[tag].extend(positions)
            else:
                self._tagged[tag] = array("q", positions)

    def visible(self, tenant: str, count: int) -> Mask:
        """Return a mask of the first `count` rows: those that `tenant` may find (its own and the open ones)."""
        owners = self._owners.view()[:count]
        own: Mask = owners == self._owner_codes.get(tenant, -1)
        own |= self.open.view()[:count]
        return own

    def tagged(self, tags: Collection[str], count: int) -> Mask:
        """Return a mask of the first `count` rows: those that have all of `tags`."""
        mask = np.ones(count, np.bool_)
        for tag in tags:
            column = self._tagged.get(tag)
            having = np.zeros(count, np.bool_)
            if column is not None:
                positions = np.frombuffer(column[:], np.int64)  # of a copy: a shared one cannot grow
                having[positions[: np.searchsorted(positions, count)]] = True
            mask &= having
        return mask

    def of_bases(self, base_models: Collection[str], count: int) -> Mask:
        """Return a mask of the first `count` rows: those that name one of these base models."""
        codes = [self._base_codes[name] for name in base_models if name in self._base_codes]
        return np.isin(self._bases.view()[:count], codes)

    def trusted(self, tenant: str, count: int) -> Mask:
        """Return a mask of the first `count` rows: those that `tenant` trusts.

        These are its own adapters, and the approved ones that it may find.
        """
        own = self._owners.view()[:count] == self._owner_codes.get(tenant, -1)
        trusted: Mask = (own | self._approved.view()[:count]) & self.visible(tenant, count)
        return trusted


def _estimate_bytes(record: AdapterRecord) -> int:
    """Return about how much memory an adapter's row and record hold."""
    assert record.embedding is not None
    vectors = 2 * record.embedding.vector.nbytes + record.embedding.own_scores.nbytes
    tags = sum(_TAG_BYTES + len(tag) for tag in record.tags)
    return _RECORD_BYTES + vectors + tags + len(record.contract or "")


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
