"""The pool as a map: adapter embeddings projected on the plane in which they differ most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from lora_store.adapter import AdapterRef
from retriever_svc.encoder import Vectors

MAX_POINTS = 2_000
_NEGLIGIBLE = 1e-9  # variance of equal vectors due to float32 rounding


@dataclass(frozen=True, slots=True)
class Point:
    """The coordinates of an adapter on the plane, or of a prompt, which has no `ref`."""

    ref: AdapterRef | None
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class PoolMap:
    """The adapters to which one caller may be routed, or `MAX_POINTS` of them, at one generation."""

    generation: int
    num_adapters: int
    shown_variance: float  # the share of the embeddings' variance that the plane keeps, 0..1
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """The coordinates of a prompt and some adapters on the map of that generation."""

    generation: int
    prompt: Point
    adapters: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Plane:
    """The two principal axes of a set of vectors: p = (v − mean) · axesᵀ. Dims: axes (2, D), mean (D,).

    An axis without variance is zero. The largest component of each axis is positive, so that small changes of the pool
    do not mirror the map.
    """

    mean: NDArray[np.float64]
    axes: NDArray[np.float64]
    shown_variance: float

    @classmethod
    def of(cls, vectors: Vectors) -> Self:
        """Return the plane of `vectors` (N, D), N ≥ 0."""
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
        """Project (N, D) vectors to (N, 2) coordinates."""
        points: NDArray[np.float64] = (vectors - self.mean) @ self.axes.T
        return points


def _upright(axes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Flip each axis so that its largest component is positive. Return two rows, even for one dimension."""
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, np.newaxis], axis=1)
    upright = np.zeros((2, axes.shape[1]))
    upright[: len(axes)] = np.where(largest < 0, -axes, axes)
    return upright
