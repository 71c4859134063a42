"""Clusters on the map: found, named, side by side, and the same for adapters and prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest

from deployments.api.pool_responses import map_object
from retriever_svc import Retriever
from retriever_svc.map_layout import FEWEST_IN_CLUSTERS, MAX_POINTS, Layout, name_clusters
from retriever_svc.projection import Plane
from tests.retriever_svc.pool_fakes import FakeEncoder, Source, live_pool, record_of

DIM = 16


def kinds_of(num_kinds: int, per_kind: int, seed: int = 0) -> np.ndarray:
    """Return vectors in groups along axes of their own, one group after the other."""
    rng = np.random.default_rng(seed)
    middles = np.repeat(np.eye(DIM)[:num_kinds], per_kind, axis=0)
    return (middles + rng.normal(scale=0.05, size=middles.shape)).astype(np.float32)


def test_groups_of_vectors_become_discs_that_do_not_overlap() -> None:
    vectors = kinds_of(5, 12)
    layout = Layout.of(vectors)
    groups, places = layout.place(vectors)
    assert [len(set(groups[kind * 12 : kind * 12 + 12])) for kind in range(5)] == [1] * 5
    assert len(set(groups)) == len(layout.discs) == 5
    far = np.linalg.norm(layout.discs[:, None] - layout.discs, axis=2)
    assert (far + np.eye(5) * 99 > layout.radii[:, None] + layout.radii).all()
    from_middle = np.linalg.norm(places - layout.discs[groups], axis=1) / layout.radii[groups]
    assert from_middle.max() < 1.01 and np.median(from_middle) < 0.9, "inside, and not all at the edge"
    assert np.ptp(places[:12], axis=0).min() > 0.1, "adapters of one kind are told apart"


def test_a_vector_has_one_place_alone_and_among_others() -> None:
    vectors = kinds_of(5, 12)
    layout = Layout.of(vectors)
    one = [layout.place(vector[np.newaxis])[1][0] for vector in vectors]
    np.testing.assert_allclose(layout.place(vectors)[1], one, atol=1e-9)
    again = Layout.of(vectors.copy())
    np.testing.assert_array_equal(again.place(vectors)[1], layout.place(vectors)[1])
    far_away = -50 * vectors[:1]  # such as a prompt like no adapter
    [group], [place] = layout.place(far_away)
    assert np.linalg.norm(place - layout.discs[group]) == pytest.approx(layout.radii[group], abs=1e-3)


def test_few_vectors_are_one_plane_and_equal_ones_one_place() -> None:
    vectors = kinds_of(5, 4)
    assert len(vectors) < FEWEST_IN_CLUSTERS
    groups, places = Layout.of(vectors).place(vectors)
    assert not groups.any()
    np.testing.assert_allclose(places, Plane.of(vectors).project(vectors), atol=1e-3)
    for num in (0, 1, 100):
        layout = Layout.of(vectors := np.ones((num, DIM), np.float32))
        assert len(layout.discs) == 1 and not layout.place(vectors)[1].any()


def test_clusters_are_named_by_what_distinguishes_them() -> None:
    rows = [
        *((0, f"ticket-{number}", ("all", "support")) for number in range(6)),
        *((1, f"negate-{number}", ("all",)) for number in range(5)),
        *((2, f"negate-x{number}", ("all",)) for number in range(4)),
        *((3, f"{number}", ("all",)) for number in range(3)),
        *((4, f"sum-sql-{number}", ("all", "sums")) for number in range(2)),
    ]
    records = [record_of(name, None, tags=tags) for _, name, tags in rows]
    named = name_clusters([group for group, _, _ in rows], records, 5)
    assert named == ["support, ticket", "negate", "negate 2", "0", "sums, sql"]


@pytest.mark.parametrize("length", [12, 64])
def test_the_answer_of_ten_thousand_adapters_has_less_than_a_megabyte(length: int) -> None:
    rng = np.random.default_rng(0)
    owner = "t" * (length - 1)
    records = [
        record_of(f"{number:0{length}}", rng.normal(size=DIM), tenant=owner, approved=True)
        for number in range(MAX_POINTS + 100)
    ]
    drawn = Retriever(live_pool(FakeEncoder({}, dim=DIM), Source(*records))).map("reader")
    assert len(json.dumps(map_object(drawn), separators=(",", ":"))) < 1_000_000
    assert (drawn.num_adapters, len(drawn.names) > 3_000) == (MAX_POINTS + 100, True)
    assert sum(cluster.num_adapters for cluster in drawn.clusters) == len(drawn.names)
    assert len({cluster.name for cluster in drawn.clusters}) == len(drawn.clusters) > 20
