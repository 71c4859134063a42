"""The pool as a picture: adapter embeddings on the plane in which they differ most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from lora_store.adapter import AdapterRef
from retriever_svc.encoder import Vectors

MAX_POINTS = 2_000
_NEGLIGIBLE = 1e-9  # of a variance: what float32 leaves of equal vectors


@dataclass(frozen=True, slots=True)
class Point:
    """Where an adapter lies on the plane; or a prompt, which has no `ref`."""

    ref: AdapterRef | None
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class PoolMap:
    """The adapters one caller may be routed to, or `MAX_POINTS` of them, as of one generation."""

    generation: int
    num_adapters: int
    shown_variance: float  # share of the embeddings' variance that the plane keeps, 0..1
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a prompt and some adapters lie on the map of that generation."""

    generation: int
    prompt: Point
    adapters: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Plane:
    """The two principal axes of a set of vectors: p = (v − mean) · axesᵀ. Dims: axes (2, D), mean (D,).

    An axis along which nothing varies is zero. The largest component of an axis is positive, so that a pool which
    hardly changes is not seen mirrored in the next generation.
    """

    mean: NDArray[np.float64]
    axes: NDArray[np.float64]
    shown_variance: float

    @classmethod
    def of(cls, vectors: Vectors) -> Self:
        """`vectors` (N, D), any number of them."""
        dim = vectors.shape[1]
        if len(vectors) == 0:
            return cls(np.zeros(dim), np.zeros((2, dim)), 0.0)
        mean = vectors.mean(axis=0, dtype=np.float64)
        centred = vectors - mean
        variances, directions = np.linalg.eigh(centred.T @ centred / len(vectors))  # smallest first
        axes = directions.T[::-1][:2].copy()
        kept = variances[::-1][:2]
        axes[kept <= _NEGLIGIBLE] = 0
        total = float(variances.clip(0).sum())
        shown = float(kept.clip(0).sum()) / total if total > _NEGLIGIBLE else 0.0
        return cls(mean, _upright(axes), shown)

    def project(self, vectors: Vectors) -> NDArray[np.float64]:
        """(N, D) -> (N, 2)"""
        points: NDArray[np.float64] = (vectors - self.mean) @ self.axes.T
        return points


def _upright(axes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each axis turned so that its largest component is positive; two rows, also where there is one dimension."""
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, np.newaxis], axis=1)
    upright = np.zeros((2, axes.shape[1]))
    upright[: len(axes)] = np.where(largest < 0, -axes, axes)
    return upright
