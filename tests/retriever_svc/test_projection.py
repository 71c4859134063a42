from __future__ import annotations

import numpy as np
import pytest

from retriever_svc.projection import Plane


def spread(num: int, dim: int, scales: tuple[float, ...], seed: int = 0) -> np.ndarray:
    """Return vectors that vary by `scales` along random directions."""
    rng = np.random.default_rng(seed)
    directions, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    lengths = np.zeros(dim)
    lengths[: len(scales)] = scales
    return (rng.normal(size=(num, dim)) * lengths @ directions.T + rng.normal(size=dim)).astype(np.float32)


def test_the_plane_has_the_largest_singular_values() -> None:
    vectors = spread(50, 8, (4, 2, 1, 0.5))
    plane = Plane.of(vectors)
    _, _, directions = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(plane.axes @ directions[:2].T), np.eye(2), atol=1e-5)
    np.testing.assert_allclose(np.abs(Plane.of(vectors, 3).axes @ directions[:3].T), np.eye(3), atol=1e-5)


def test_distances_are_preserved_if_vectors_vary_in_two_directions_only() -> None:
    vectors = spread(20, 8, (3, 2))
    points = Plane.of(vectors).project(vectors)
    flat = np.linalg.norm(points[:, None] - points[None], axis=-1)
    real = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
    np.testing.assert_allclose(flat, real, atol=1e-4)


def test_no_order_of_the_vectors_mirrors_the_plane() -> None:
    vectors = spread(30, 8, (3, 2, 1))
    np.testing.assert_allclose(Plane.of(vectors).axes, Plane.of(vectors[::-1]).axes, atol=1e-6)
    axes = Plane.of(vectors).axes
    assert all(axis[np.abs(axis).argmax()] > 0 for axis in axes)


@pytest.mark.parametrize(
    ("vectors", "varies"),
    [
        (np.empty((0, 4), np.float32), False),
        (np.ones((1, 4), np.float32), False),
        (np.ones((5, 4), np.float32), False),
        (np.asarray([[1, 0, 0, 0], [0, 1, 0, 0]], np.float32), True),
        (np.asarray([[1.0], [2.0]], np.float32), True),
    ],
    ids=["none", "one", "all-same", "two", "one-dimension"],
)
def test_few_or_equal_vectors_have_a_plane_too(vectors: np.ndarray, varies: bool) -> None:
    points = Plane.of(vectors).project(vectors)
    assert points.shape == (len(vectors), 2) and np.isfinite(points).all()
    assert points.any() == varies
