"""Inverted lists: vectors grouped around learned centres, so that a search reads only the nearest groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import faiss
import numpy as np
from numpy.typing import NDArray

from retriever_svc.adapter_table import Mask, Positions
from retriever_svc.encoder import Vectors
from retriever_svc.inner_products import best_rows

_POINTS_PER_LIST = 64  # training points of k-means
_ROUNDS = 8  # iterations of k-means
_ADD_ROWS = 65_536


@dataclass(frozen=True, slots=True)
class ListedPart:
    """The part of the inverted lists visible to one caller."""

    bits: NDArray[np.uint8]  # one bit per slot, lowest bit first: visible or not
    lists: NDArray[np.int64]  # the lists with visible slots
    sizes: NDArray[np.int64]  # the number of visible slots by list


class InvertedLists:
    """8-bit codes of unit vectors, each in the list of its nearest centre. Immutable once trained.

    Each code has a slot, which is part of the saved form. `positions` (S,) maps slots to positions in the index, -1 for
    adapters that are gone. Dims: S slots, L lists, D dimensions.
    """

    def __init__(self, index: Any, positions: Positions) -> None:
        """Wrap a trained faiss.IndexIVFScalarQuantizer (`Any`, since FAISS's stubs are incomplete)."""
        self._index, self.positions = index, positions
        self._present = positions[positions >= 0]
        quantizer: Any = faiss.downcast_index(index.quantizer)
        self._centres = faiss.vector_to_array(quantizer.codes).view(np.float32).reshape(index.nlist, index.d).copy()
        steps = faiss.vector_to_array(index.sq.trained)[index.d :] / 255  # `trained`: minima, then widths, by dimension
        self.code_error = float(4 * steps.max() / 12**0.5)  # four standard deviations of a unit query's score
        self._list_of = np.empty(index.ntotal, np.int32)  # by slot
        for number, slots in _slots_by_list(index):
            self._list_of[slots] = number

    @classmethod
    def train(cls, vectors: Vectors) -> Self:
        """Train lists over `vectors` (P, D); slot i is row i. Use one thread, to leave the other cores to requests."""
        faiss.omp_set_num_threads(1)  # applies to calls of this thread
        num_lists = min(int(2 * len(vectors) ** 0.5), len(vectors))
        kind, metric = faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
        centres = faiss.IndexFlatIP(vectors.shape[1])
        index: Any = faiss.IndexIVFScalarQuantizer(centres, vectors.shape[1], num_lists, kind, metric, False)
        index.cp.niter, index.cp.spherical, index.cp.min_points_per_centroid = _ROUNDS, True, 1
        num_points = min(len(vectors), _POINTS_PER_LIST * num_lists)
        index.train(vectors[np.random.default_rng(0).permutation(len(vectors))[:num_points]])
        for start in range(0, len(vectors), _ADD_ROWS):
            index.add(vectors[start : start + _ADD_ROWS])
        return cls(index, np.arange(len(vectors)))

    @classmethod
    def from_bytes(cls, data: NDArray[np.uint8], positions: Positions) -> Self:
        """Return the lists that `to_bytes` wrote. FAISS does not validate its input, so the bytes must be intact."""
        return cls(faiss.deserialize_index(data), positions)

    def to_bytes(self) -> NDArray[np.uint8]:
        """Return the lists in FAISS's format, without `positions`."""
        data: NDArray[np.uint8] = faiss.serialize_index(self._index)
        return data

    @property
    def num_gone(self) -> int:
        return len(self.positions) - len(self._present)

    @property
    def num_bytes(self) -> int:
        codes = self._index.ntotal * (self._index.code_size + 8)  # 8: the slot number of each code
        return int(codes) + self._centres.nbytes + self._list_of.nbytes + self.positions.nbytes

    def part_of(self, allowed: Mask) -> ListedPart:
        """Return the part of the lists with the `allowed` positions."""
        seen = allowed[self.positions] & (self.positions >= 0)
        sizes = np.bincount(self._list_of[seen], minlength=len(self._centres))
        return ListedPart(np.packbits(seen, bitorder="little"), np.flatnonzero(sizes), sizes)

    def unlisted(self, allowed: Mask) -> Positions:
        """Return those of the `allowed` positions that are in no list."""
        rest = allowed.copy()
        rest[self._present] = False
        return np.flatnonzero(rest)

    def best(
        self, query: Vectors, num_wanted: int, part: ListedPart, num_probes: int
    ) -> tuple[NDArray[np.float32], Positions]:
        """Return (scores, positions) by the codes, best first, from the nearest lists with visible slots.

        Read at least `num_probes` lists, and enough to find `num_wanted`, if there are so many. Scores are within
        `code_error` of the exact ones.
        """
        if len(part.lists) == 0:
            return np.empty(0, np.float32), np.empty(0, np.int64)
        lists = self._nearest_lists(query, num_wanted, part, num_probes)
        scores, slots = np.empty((1, num_wanted), np.float32), np.empty((1, num_wanted), np.int64)
        distances = np.zeros(len(lists), np.float32)  # to the centres; unused by this quantizer
        selector = faiss.IDSelectorBitmap(len(part.bits), faiss.swig_ptr(part.bits))
        self._index.search_preassigned_c(
            1,
            faiss.swig_ptr(query),
            num_wanted,
            faiss.swig_ptr(lists),
            faiss.swig_ptr(distances),
            faiss.swig_ptr(scores),
            faiss.swig_ptr(slots),
            False,
            faiss.SearchParametersIVF(nprobe=len(lists), sel=selector),  # type: ignore[call-arg]
        )
        found = slots[0] >= 0
        return scores[0][found], self.positions[slots[0][found]]

    def _nearest_lists(self, query: Vectors, num_wanted: int, part: ListedPart, num_probes: int) -> NDArray[np.int64]:
        num_lists = min(num_probes, len(part.lists))
        while True:
            _, lists = best_rows(query, self._centres, part.lists, num_lists)
            if num_lists == len(part.lists) or part.sizes[lists].sum() >= num_wanted:
                return lists
            num_lists = min(4 * num_lists, len(part.lists))


def _slots_by_list(index: Any) -> Iterator[tuple[int, NDArray[np.int64]]]:
    for number in range(index.nlist):
        size = index.invlists.list_size(number)
        if size:
            yield number, faiss.rev_swig_ptr(index.invlists.get_ids(number), size)
