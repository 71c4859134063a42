"""Exact cosine search over adapters, restricted to those a caller may see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from lora_store.adapter import AdapterRef
from lora_store.records import AdapterRecord
from retriever_svc.encoder import Vectors, unit_rows

Bitmap = NDArray[np.uint8]  # one bit per position, the lowest bit first
_SCORE_ERROR = 1e-5  # FAISS sums float32 in an order that depends on the batch; this bounds what that changes
_TIE_ROOM = 8


class Match(NamedTuple):
    """One adapter found, with the cosine of its embedding to the query."""

    record: AdapterRecord
    score: float


class AdapterIndex:
    """Adapters by embedding, never changed once built. Dims: P adapters, N queries, D dimensions.

    FAISS narrows the pool, then scores are taken again in float64 row by row: equal embeddings score exactly equal,
    and an answer does not depend on which other queries share its batch.
    """

    def __init__(self, records: Sequence[AdapterRecord], vectors: Vectors) -> None:
        """`vectors` (P, D), of any length but zero, row i of `records[i]`."""
        order = sorted(range(len(records)), key=lambda i: (records[i].ref.tenant, records[i].ref.name))
        self.records = tuple(records[i] for i in order)  # so that position order is name order, which breaks ties
        self._vectors = unit_rows(np.asarray(vectors, np.float32))[order]
        self._positions = {record.ref: position for position, record in enumerate(self.records)}
        self._flat = faiss.IndexFlatIP(vectors.shape[1])
        self._flat.add(self._vectors)

    def __len__(self) -> int:
        return len(self.records)

    def bitmap(self, refs: Iterable[AdapterRef]) -> Bitmap:
        """The `allowed` set of those of `refs` that are in the index."""
        mask = np.zeros(len(self), np.bool_)
        mask[[self._positions[ref] for ref in refs if ref in self._positions]] = True
        return np.packbits(mask, bitorder="little")

    def search(self, vectors: Vectors, top_k: int, allowed: Bitmap | None = None) -> list[list[Match]]:
        """The exact best `min(top_k, number allowed)` per query, best first, ties by tenant and name.

        `vectors` (N, D) unit rows; `allowed` None means every adapter.
        """
        num_allowed = len(self) if allowed is None else int(np.bitwise_count(allowed).sum())
        num_wanted = min(top_k, num_allowed)
        if num_wanted == 0 or len(vectors) == 0:
            return [[] for _ in vectors]
        positions = self._shortlists(vectors, num_wanted, num_allowed, allowed)
        return [self._best(query, row, num_wanted) for query, row in zip(vectors, positions, strict=True)]

    def _shortlists(
        self, vectors: Vectors, num_wanted: int, num_allowed: int, allowed: Bitmap | None
    ) -> NDArray[np.int64]:
        """Positions (N, W) that surely hold each query's best: W grows until the last is clearly no tie."""
        params = faiss.SearchParameters()
        if allowed is not None:
            params.sel = faiss.IDSelectorBitmap(len(allowed), faiss.swig_ptr(allowed))
        width = min(num_wanted + _TIE_ROOM, num_allowed)
        while True:
            scores, positions = self._flat.search(vectors, width, params=params)
            if width == num_allowed or np.all(scores[:, -1] < scores[:, num_wanted - 1] - _SCORE_ERROR):
                return np.asarray(positions)
            width = min(2 * width, num_allowed)

    def _best(self, query: Vectors, positions: NDArray[np.int64], num_wanted: int) -> list[Match]:
        scores = np.sum(self._vectors[positions] * query.astype(np.float64), axis=-1).clip(-1, 1)
        best = np.lexsort((positions, -scores))[:num_wanted]
        return [Match(self.records[positions[i]], float(scores[i])) for i in best]
