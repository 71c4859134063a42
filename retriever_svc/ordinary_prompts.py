"""Ordinary prompts: what people ask an assistant, to compare with what a pool's adapters are for.

They are in `data/ordinary_prompts.jsonl`, one a line. This project wrote them; they come from no data set.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from importlib.resources import files
from typing import Self

import numpy as np
from numpy.typing import NDArray

from retriever_svc.encoder import Vectors

NUM_NEAREST = 3
_SMALL = 1e-4  # the least spread: equal prompts have none


def ordinary_prompts() -> list[str]:
    """Return the packaged prompts."""
    return [json.loads(line)["input"] for line in _file().decode().splitlines()]


def prompts_digest() -> str:
    """Return the sha256 of the packaged prompts."""
    return hashlib.sha256(_file()).hexdigest()


def _file() -> bytes:
    return files("retriever_svc").joinpath("data/ordinary_prompts.jsonl").read_bytes()


@dataclass(frozen=True, slots=True, eq=False)
class OrdinaryVectors:
    """The vectors of ordinary prompts, and the spread of their nearness to each other.

    The nearness of a text is its mean cosine to the 3 nearest ordinary prompts, itself left out. It is -1 if there are
    not more than 3. Dims: J prompts, D dimensions, N queries.
    """

    vectors: Vectors  # (J, D) unit rows
    spread: float  # of the nearness of the ordinary prompts; infinite if nearness does not count

    @classmethod
    def of(cls, vectors: Vectors, *, is_projected: bool = True) -> Self:
        """Measure the nearness of ordinary prompts with these vectors.

        It does not count without a projection: there an adapter's mean is further from its own prompts than single
        ordinary prompts are.
        """
        if len(vectors) <= NUM_NEAREST or not is_projected:
            return cls(vectors, math.inf)
        cosines = vectors @ vectors.T
        np.fill_diagonal(cosines, -1)
        return cls(vectors, max(float(_mean_of_nearest(cosines).std()), _SMALL))

    def nearness(self, queries: Vectors) -> NDArray[np.float64]:
        """Return the nearness of each query (N, D): (N,). A row does not depend on the other rows."""
        if len(self.vectors) <= NUM_NEAREST:
            return np.full(len(queries), -1.0)
        cosines = [np.einsum("jd,d->j", self.vectors, query) for query in queries]  # BLAS would round by alignment
        return np.array([_mean_of_nearest(row[np.newaxis])[0] for row in cosines])


def _mean_of_nearest(cosines: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the mean of the largest entries of each row."""
    nearest = np.partition(cosines, -NUM_NEAREST, axis=1)[:, -NUM_NEAREST:]
    means: NDArray[np.float64] = np.sort(nearest, axis=1).mean(axis=1, dtype=np.float64)
    return means
