"""The pool as a map: what it consists of, and the plane in which vectors differ most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from lora_store.adapter import AdapterRef

_NEGLIGIBLE = 1e-9  # variance of equal vectors due to float32 rounding


@dataclass(frozen=True, slots=True)
class Point:
    """The coordinates of an adapter on the plane, or of a prompt, which has no `ref`."""

    ref: AdapterRef | None
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Cluster:
    """Adapters that are near each other, as a disc of the map. `name`: the tags or words that distinguish them."""

    name: str
    x: float
    y: float
    radius: float
    num_adapters: int


@dataclass(frozen=True, slots=True)
class PoolMap:
    """The adapters to which one caller may be routed, or an even selection of them, at one generation."""

    generation: int
    num_adapters: int
    names: tuple[str, ...]  # as the caller writes them
    places: tuple[tuple[float, float], ...]
    groups: tuple[int, ...]  # the position in `clusters`
    clusters: tuple[Cluster, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """The coordinates of a prompt and some adapters on the map of that generation."""

    generation: int
    prompt: Point
    adapters: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Plane:
    """The principal axes of a set of vectors: p = (v − mean) · axesᵀ. Dims: axes (A, D), mean (D,).

    An axis without variance is zero. The largest component of each axis is positive, so that small changes of the pool
    do not mirror the map.
    """

    mean: NDArray[np.float64]
    axes: NDArray[np.float64]

    @classmethod
    def of(cls, vectors: NDArray[np.floating], num_axes: int = 2) -> Self:
        """Return the plane of `vectors` (N, D), N ≥ 0, with the `num_axes` axes of the largest variance."""
        dim = vectors.shape[1]
        if len(vectors) == 0:
            return cls(np.zeros(dim), np.zeros((num_axes, dim)))
        mean = vectors.mean(axis=0, dtype=np.float64)
        centred = vectors - mean
        variances, directions = np.linalg.eigh(centred.T @ centred / len(vectors))  # smallest first
        axes = directions.T[::-1][:num_axes].copy()
        axes[variances[::-1][:num_axes] <= _NEGLIGIBLE] = 0
        return cls(mean, _upright(axes, num_axes))

    def project(self, vectors: NDArray[np.floating]) -> NDArray[np.float64]:
        """Project (N, D) vectors to (N, A) coordinates."""
        points: NDArray[np.float64] = (vectors - self.mean) @ self.axes.T
        return points


def _upright(axes: NDArray[np.float64], num_axes: int) -> NDArray[np.float64]:
    """Flip each axis so that its largest component is positive. Return `num_axes` rows, even for fewer dimensions."""
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, np.newaxis], axis=1)
    upright = np.zeros((num_axes, axes.shape[1]))
    upright[: len(axes)] = np.where(largest < 0, -axes, axes)
    return upright
