"""The exact scan behind all searches: one query against chosen rows of a matrix, without copying them."""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray

from retriever_svc.encoder import Vectors


def best_rows(
    query: Vectors, matrix: Vectors, rows: NDArray[np.int64], num_wanted: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return (scores, rows) for the `num_wanted` of `rows` with the largest inner products, best first.

    `query` (D,), `matrix` (P, D), both contiguous float32; 0 < num_wanted ≤ len(rows). One thread reads one query: a
    second thread would gain little and, on a busy machine, would wait for a core.
    """
    scores, found = np.empty(num_wanted, np.float32), np.empty(num_wanted, np.int64)
    faiss.knn_inner_products_by_idx(  # type: ignore[attr-defined]  # FAISS 1.15's stubs lack it
        faiss.swig_ptr(query),
        faiss.swig_ptr(matrix),
        faiss.swig_ptr(rows),
        matrix.shape[1],
        1,
        len(matrix),
        len(rows),
        num_wanted,
        faiss.swig_ptr(scores),
        faiss.swig_ptr(found),
        0,
    )
    return scores, found
