"""Lay out the map of a pool: clusters as discs side by side, and in each its adapters on their own plane.

One plane for all would be a cloud in which nothing is found: of hundreds of adapters it keeps little of what
distinguishes them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from lora_store.records import AdapterRecord
from retriever_svc.projection import Cluster, Plane

MAX_POINTS = 10_000
MAX_NAME_CHARS = 480_000  # A map whose names have more shows fewer adapters: its answer has less than a megabyte.
FEWEST_IN_CLUSTERS = 24  # adapters; fewer are easily found on one plane
_MOST_CLUSTERS = 24
_FITTED = 2_000  # vectors that determine axes and clusters
_AXES = 32  # in which clusters are found
_ROUNDS = 20
_PUSHES = 300
_GAP = 0.06  # between discs
_COORDINATE_DIGITS = 4
_SHARED = 0.3  # the least by which a word is more frequent in a cluster than elsewhere
_TAG_BONUS = 0.1  # a tag was chosen by a person, a word of a name was not
_WORD = re.compile(r"[^\W\d_]{3,}")

Rows = NDArray[np.float64]
Groups = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Layout:
    """The place of any vector on the map. Dims: centroids (G, A), discs (G, 2), radii (G,), scales (G,).

    A vector belongs to the cluster of the nearest centroid, and is drawn inside its disc.
    """

    space: Plane  # (A, D): the axes in which clusters are found
    centroids: Rows
    planes: tuple[Plane, ...]  # (2, A) of each cluster
    discs: Rows
    radii: Rows
    scales: Rows

    @classmethod
    def of(cls, vectors: NDArray[np.floating]) -> Self:
        """Return the layout of `vectors` (N, D), N ≥ 0."""
        fitted = vectors[:: max(1, -(-len(vectors) // _FITTED))]
        space = Plane.of(fitted, _AXES)
        rows = space.project(vectors)
        centroids = _find_centroids(space.project(fitted))
        if len(rows):
            centroids = centroids[np.unique(_find_nearest(rows, centroids))]  # without empty ones
        groups = _find_nearest(rows, centroids)
        members = [rows[groups == group] for group in range(len(centroids))]
        planes = tuple(map(Plane.of, members))
        reaches = np.asarray([_reach(plane.project(own)) for plane, own in zip(planes, members, strict=True)])
        if len(planes) == 1:
            return cls(space, centroids, planes, np.zeros((1, 2)), reaches, np.ones(1))
        radii = 0.1 + 0.9 * np.sqrt([len(own) / len(rows) for own in members])
        scales = np.where(reaches > 0, 0.9 * radii / np.maximum(reaches, 1e-9), 0)
        return cls(space, centroids, planes, _arrange(centroids, radii), radii, scales)

    def place(self, vectors: NDArray[np.floating]) -> tuple[Groups, Rows]:
        """Return the clusters (N,) and the coordinates (N, 2) of vectors (N, D)."""
        rows = self.space.project(vectors)
        groups = _find_nearest(rows, self.centroids)
        places = np.zeros((len(rows), 2))
        for group, plane in enumerate(self.planes):
            mine = groups == group
            local = plane.project(rows[mine]) * self.scales[group]
            if len(self.planes) > 1:
                far = np.linalg.norm(local, axis=1, keepdims=True)
                local *= np.minimum(1, self.radii[group] / np.maximum(far, 1e-9))
            places[mine] = self.discs[group] + local
        return groups, places.round(_COORDINATE_DIGITS)

    def clusters(self, groups: Groups, records: Sequence[AdapterRecord]) -> tuple[Cluster, ...]:
        """Return the discs, with names that distinguish these adapters in their groups (N,)."""
        names = name_clusters(groups.tolist(), records, len(self.planes))
        sizes = np.bincount(groups, minlength=len(self.planes)).tolist()
        discs = np.column_stack((self.discs, self.radii)).round(_COORDINATE_DIGITS).tolist()
        return tuple(
            Cluster(name, x, y, radius, size) for name, (x, y, radius), size in zip(names, discs, sizes, strict=True)
        )


def name_clusters(groups: Sequence[int], records: Sequence[AdapterRecord], num_clusters: int) -> list[str]:
    """Name each cluster by the tag, or the word of names, that many of its adapters have and few of the others.

    A second one that many of them have too is added. A cluster that nothing distinguishes has the name of its first
    adapter. Of equal names all but the first one have numbers.
    """
    terms = [{*record.tags, *_WORD.findall(record.ref.name.lower())} for record in records]
    tags = {tag for record in records for tag in record.tags}
    everywhere = Counter(term for own in terms for term in own)
    members: list[list[int]] = [[] for _ in range(num_clusters)]
    for place, group in enumerate(groups):
        members[group].append(place)
    names, used = [""] * num_clusters, Counter[str]()
    for group in sorted(range(num_clusters), key=lambda group: -len(members[group])):
        size = len(members[group])
        inside = Counter(term for place in members[group] for term in terms[place])
        others = max(1, len(records) - size)
        worth = {
            term: count / size - (everywhere[term] - count) / others + _TAG_BONUS * (term in tags)
            for term, count in inside.items()
        }
        best = sorted((term for term in worth if worth[term] >= _SHARED), key=lambda term: (-worth[term], term))
        label = ", ".join(best[:2]) or (records[members[group][0]].ref.name if size else "")
        used[label] += 1
        names[group] = f"{label} {used[label]}" if used[label] > 1 else label
    return names


def _find_centroids(rows: Rows) -> Rows:
    """Return the centroids (G, A) of clusters of rows (N, A), by k-means from rows far apart."""
    if len(rows) < FEWEST_IN_CLUSTERS:
        return rows.mean(axis=0, keepdims=True) if len(rows) else np.zeros((1, rows.shape[1]))
    wanted = min(_MOST_CLUSTERS, round(0.7 * len(rows) ** 0.5))
    draw = np.random.default_rng(0)
    centroids = rows[:1]
    while len(centroids) < wanted:
        far = np.min([((rows - centroid) ** 2).sum(axis=1) for centroid in centroids], axis=0)
        if far.sum() <= 1e-9:
            break  # all others equal one of these
        centroids = np.vstack((centroids, rows[draw.choice(len(rows), p=far / far.sum())]))
    for _ in range(_ROUNDS):
        groups = _find_nearest(rows, centroids)
        centroids = np.stack([rows[groups == group].mean(axis=0) for group in np.unique(groups)])
    return centroids


def _find_nearest(rows: Rows, centroids: Rows) -> Groups:
    """Return the position (N,) of the centroid that is nearest to each row (N, A)."""
    nearest: Groups = (2 * rows @ centroids.T - (centroids**2).sum(axis=1)).argmax(axis=1)
    return nearest


def _reach(points: Rows) -> float:
    """Return the radius around 0 that holds nearly all of the points (N, 2)."""
    return float(np.quantile(np.linalg.norm(points, axis=1), 0.98)) if len(points) else 0.0


def _arrange(centroids: Rows, radii: Rows) -> Rows:
    """Return the centres (G, 2) of discs that do not overlap, near each other where the centroids are."""
    centres = Plane.of(centroids).project(centroids)
    turns = np.arange(len(centres))
    centres /= max(float(np.abs(centres).max()), 1e-9)
    centres += 1e-3 * np.column_stack((np.cos(turns), np.sin(turns)))  # equal ones are pushed apart too
    least = radii[:, np.newaxis] + radii + _GAP
    np.fill_diagonal(least, 0)
    for _ in range(_PUSHES):
        apart = centres[:, np.newaxis] - centres
        far = np.linalg.norm(apart, axis=2)
        lacking = (least - far).clip(0)
        if lacking.max() < 1e-3:
            break
        centres += (apart / np.maximum(far, 1e-9)[..., np.newaxis] * lacking[..., np.newaxis] / 2).sum(axis=1)
    return centres
