"""Apply a tenant's rankings to what a search found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_store.adapter import AdapterRef
from lora_store.rankings import Ranking
from lora_store.records import AdapterRecord, Embedding
from lora_store.snapshot import Snapshot
from retriever_svc.encoder import Vectors
from retriever_svc.index import Match

MayFind = Callable[[AdapterRecord, str], bool]
"""Whether a tenant may be given an adapter without naming it."""


@dataclass(frozen=True, slots=True)
class Preferences:
    """The best adapters of a tenant's rankings, as of one generation. Dims: R regions, D dimensions.

    `better`: by a beaten adapter, the best live one of its ranking. `regions`: the best live adapter of each ranking
    whose anchor was withdrawn, with the anchor's embedding. `vectors` (R, D) are those embeddings' vectors.
    """

    better: dict[AdapterRef, AdapterRecord]
    regions: tuple[AdapterRecord, ...]
    vectors: Vectors

    @classmethod
    def of(cls, snapshot: Snapshot, tenant: str, encoder: str, may_find: MayFind) -> Preferences:
        """Read the rankings of `tenant`. Ignore those of another encoder, and adapters that it may not be given."""
        better: dict[AdapterRef, AdapterRecord] = {}
        regions: list[AdapterRecord] = []
        for ranking in (rank.ranking for rank in snapshot.rankings.get(tenant, ())):
            leader = _leader(ranking, snapshot, tenant, may_find)
            anchor = snapshot.records.get((ranking.anchor.tenant, ranking.anchor.name))
            if leader is None or (anchor is not None and anchor.ref != ranking.anchor):
                continue
            better |= {item.ref: leader for item in ranking.adapters if item.is_beaten}
            if anchor is None and ranking.encoder == encoder:
                embedding = Embedding(ranking.encoder, ranking.vector, ranking.own_scores)
                regions.append(replace(leader, embedding=embedding))
        vectors = [record.embedding.vector for record in regions if record.embedding is not None]
        return cls(better, tuple(regions), np.stack(vectors) if vectors else np.empty((0, 0), np.float32))

    def applied(self, query: Vectors, matches: Sequence[Match], top_k: int, tags: Sequence[str]) -> list[Match]:
        """Return the matches with beaten adapters replaced by better ones, and with those of withdrawn anchors added.

        A better adapter gets the score and the embedding of the one it replaces, since it answers that one's prompts.
        The result has at most `top_k` matches, sorted by score, and contains no weights twice. `query` (D,) has length
        1.
        """
        if not self.better and not self.regions:
            return list(matches)
        found = [self._replaced(match, tags) for match in matches]
        if self.regions:
            scores = (self.vectors @ query).tolist()
            added = zip(self.regions, scores, strict=True)
            found += [Match(record, score) for record, score in added if _has_tags(record, tags)]
        found.sort(key=lambda match: -match.score)
        distinct: dict[str, Match] = {}
        for match in found:
            distinct.setdefault(match.record.weights_digest, match)
        return list(distinct.values())[:top_k]

    def _replaced(self, match: Match, tags: Sequence[str]) -> Match:
        better = self.better.get(match.record.ref)
        if better is None or not _has_tags(better, tags):
            return match
        return match._replace(record=replace(better, embedding=match.record.embedding))


def _leader(ranking: Ranking, snapshot: Snapshot, tenant: str, may_find: MayFind) -> AdapterRecord | None:
    """Return the best adapter that is still live in the measured version and that `tenant` may be given, or None."""
    for ref in (item.ref for item in ranking.adapters if not item.is_beaten):
        record = snapshot.records.get((ref.tenant, ref.name))
        if record is not None and record.ref == ref and may_find(record, tenant):
            return record
    return None


def _has_tags(record: AdapterRecord, tags: Sequence[str]) -> bool:
    return set(tags) <= set(record.tags)
