"""What one generation of the catalogue offers to each caller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lora_store.records import AdapterRecord
from lora_store.snapshot import Snapshot
from retriever_svc.calibration import floor_of
from retriever_svc.encoder import Encoder, Vectors
from retriever_svc.index import AdapterIndex, Bitmap, Match


@dataclass(frozen=True, slots=True)
class CallerView:
    """The part of the index one tenant may see, and the score floor its samples give."""

    allowed: Bitmap
    floor: float


@dataclass(frozen=True, slots=True)
class Pool:
    """One generation, never changed: a new one is a new Pool, so a search in progress sees one generation only."""

    snapshot: Snapshot
    index: AdapterIndex
    own_scores: Mapping[str, NDArray[np.float64]]  # by version digest; empty where no floor is measured
    _views: dict[str, CallerView] = field(default_factory=dict)

    def view(self, tenant: str) -> CallerView:
        """What `tenant` may be routed to. Only adapters it sees count for its floor: no private one shows in it."""
        view = self._views.get(tenant)
        if view is None:  # two threads may both build it: the same view, kept once
            visible = [record.ref for record in self.snapshot.visible_to(tenant)]
            scores = [self.own_scores[ref.digest] for ref in visible if ref.digest in self.own_scores]
            view = self._views[tenant] = CallerView(self.index.bitmap(visible), floor_of(scores))
        return view

    def nearest(self, vectors: Vectors, top_k: int, tenant: str) -> list[list[Match]]:
        """The best `top_k` adapters per query that `tenant` may see, of distinct weights, or all of them if fewer.

        Of adapters with equal weights the best scored stands: a plan cannot hold the same weights twice.
        """
        allowed, width = self.view(tenant).allowed, top_k
        while True:
            found = self.index.search(vectors, width, allowed)
            distinct = [_distinct_weights(matches) for matches in found]
            exhausted = any(len(matches) < width for matches in found)
            if exhausted or all(len(matches) >= top_k for matches in distinct):
                return [matches[:top_k] for matches in distinct]
            width *= 2


def routable_index(snapshot: Snapshot, encoder: Encoder) -> AdapterIndex:
    """The index of all adapters that `encoder` embedded; the others are reachable by name only."""
    records = [record for record in snapshot.records.values() if _is_routable(record, encoder)]
    vectors = np.asarray([record.embedding.vector for record in records], np.float32).reshape(-1, encoder.dim)
    return AdapterIndex(records, vectors)


def _is_routable(record: AdapterRecord, encoder: Encoder) -> bool:
    return record.embedding is not None and record.encoder == encoder.identity


def _distinct_weights(matches: list[Match]) -> list[Match]:
    first: dict[str, Match] = {}
    for match in matches:
        first.setdefault(match.record.weights_digest, match)
    return list(first.values())
