"""Adapters by position: what all generations of an index share, and what a caller's part of it is computed from."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from lora_store.records import AdapterRecord
from lora_store.snapshot import Key
from retriever_svc.append_only_array import GrowingArray
from retriever_svc.calibration import Votes, vote_of
from retriever_svc.encoder import unit_rows

Mask = NDArray[np.bool_]
Positions = NDArray[np.int64]
_BLOCK_ROWS = 8192  # bounds what an append holds twice


class AdapterTable:
    """One row per adapter version, at a position that never changes. One writer; readers look below their own count.

    `positions`, for the writer alone: where each name's newest version stands.
    """

    def __init__(self, dim: int, num_rows: int = 0, *, requires_approval: bool = False) -> None:
        """Empty, with room for `num_rows` of `dim` dimensions."""
        self.dim = dim
        self._requires_approval = requires_approval
        self.records: list[AdapterRecord] = []
        self.positions: dict[Key, int] = {}
        self.vectors = GrowingArray(np.float32, (dim,), num_rows=num_rows)  # unit rows
        self.open = GrowingArray(np.bool_, num_rows=num_rows)  # found by every tenant
        self._owners = GrowingArray(np.int32, num_rows=num_rows)
        self._owner_codes: dict[str, int] = {}
        self._approved = GrowingArray(np.bool_, num_rows=num_rows)
        self._votes = GrowingArray(np.float64, num_rows=num_rows)  # on the score floor; NaN for none
        self._tagged: dict[str, GrowingArray] = {}

    def __len__(self) -> int:
        return len(self._owners)

    @property
    def num_bytes(self) -> int:
        columns = [self.vectors, self.open, self._owners, self._approved, self._votes, *self._tagged.values()]
        return sum(column.num_bytes for column in columns)

    def append(self, records: Sequence[AdapterRecord]) -> None:
        """`records`, each with an embedding of `dim` dimensions and any length but zero, take the next positions."""
        for start in range(0, len(records), _BLOCK_ROWS):
            self._append_block(records[start : start + _BLOCK_ROWS])

    def _append_block(self, records: Sequence[AdapterRecord]) -> None:
        embeddings = [record.embedding for record in records if record.embedding is not None]
        assert len(embeddings) == len(records), "only what has an embedding has a position"
        first = len(self)
        self.records.extend(records)
        self.vectors.append(unit_rows(np.stack([embedding.vector for embedding in embeddings])))
        self.open.append(np.asarray([record.is_open(requires_approval=self._requires_approval) for record in records]))
        self._approved.append(np.asarray([record.approved for record in records]))
        self._votes.append(np.asarray([vote_of(embedding.own_scores) for embedding in embeddings]))
        self._append_labels(records, first)
        codes = [self._owner_codes.setdefault(r.ref.tenant, len(self._owner_codes)) for r in records]
        self._owners.append(np.asarray(codes, np.int32))

    def _append_labels(self, records: Sequence[AdapterRecord], first: int) -> None:
        by_tag: dict[str, list[int]] = {}
        for position, record in enumerate(records, first):
            self.positions[record.ref.tenant, record.ref.name] = position
            for tag in record.tags:
                by_tag.setdefault(tag, []).append(position)
        for tag, positions in by_tag.items():
            self._tagged.setdefault(tag, GrowingArray(np.int64)).append(np.asarray(positions))

    def visible(self, tenant: str, count: int) -> Mask:
        """Which of the first `count` rows `tenant` may find: its own and the open ones."""
        owners = self._owners.view()[:count]
        own: Mask = owners == self._owner_codes.get(tenant, -1)
        own |= self.open.view()[:count]
        return own

    def tagged(self, tags: Collection[str], count: int) -> Mask:
        """Which of the first `count` rows carry all of `tags`."""
        mask = np.ones(count, np.bool_)
        for tag in tags:
            column = self._tagged.get(tag)
            having = np.zeros(count, np.bool_)
            if column is not None:
                positions = column.view()
                having[positions[positions < count]] = True
            mask &= having
        return mask

    def votes_for(self, tenant: str, alive: Mask) -> tuple[Votes, Votes]:
        """Return the votes on the score floor of `tenant` (see `calibration`), of the `alive` rows that it may find.

        The first (T,) are of its own and of approved adapters, one each. The second (O,) are one for each tenant with
        other public adapters: the mean of their votes.
        """
        count = len(alive)
        owners, votes = self._owners.view()[:count], self._votes.view()[:count]
        voting = alive & np.isfinite(votes) & self.visible(tenant, count)
        trusted = self._approved.view()[:count] | (owners == self._owner_codes.get(tenant, -1))
        rest = voting & ~trusted
        numbers = np.bincount(owners[rest])
        sums = np.bincount(owners[rest], weights=votes[rest])
        return votes[voting & trusted], sums[numbers > 0] / numbers[numbers > 0]
