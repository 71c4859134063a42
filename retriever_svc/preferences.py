"""Apply a tenant's rankings, and the outcomes of its requests, to what a search found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_store.adapter import AdapterRef
from lora_store.rankings import Ranking
from lora_store.records import AdapterRecord, Embedding
from lora_store.snapshot import Snapshot
from retriever_svc.encoder import Vectors
from retriever_svc.index import Match
from retriever_svc.ordinary_prompts import centred
from retriever_svc.served_bases import ServedBases

MayFind = Callable[[AdapterRecord, str], bool]
"""Whether a tenant may be given an adapter without naming it."""
# The least cosine of a prompt to one with an outcome. On the tune pools of `python -m benchmarks.routing.wording` one
# in 10,000 pairs of prompts for different adapters has 0.62.
NEAR_OUTCOME = 0.65


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a client said about one prompt: of an adapter, with the prompt's embedding, or None for every adapter."""

    record: AdapterRecord | None
    score: float


class _NearOutcome(NamedTuple):
    """An outcome near a prompt, with its cosine to one view of the prompt, and whether it is near this view itself."""

    outcome: Outcome
    cosine: float
    is_of_this_view: bool


@dataclass(frozen=True, slots=True)
class Preferences:
    """The best adapters of a tenant's rankings, as of one generation. Dims: R regions, J judged prompts, D dimensions.

    `better`: by a beaten adapter, the best live one of its ranking. `regions`: the best live adapter of each ranking
    whose anchor was withdrawn, with the anchor's embedding. `vectors` (R, D) are those embeddings' vectors. `judged`
    (J, D) are the vectors of the prompts with outcomes. `centre` (D,): as in `Pool`; from it prompts are compared.
    An adapter replaces only those of its own base model.
    """

    better: dict[AdapterRef, AdapterRecord]
    regions: tuple[AdapterRecord, ...]
    vectors: Vectors
    outcomes: tuple[Outcome, ...] = ()
    judged: Vectors = field(default_factory=lambda: np.empty((0, 0), np.float32))
    centre: Vectors | None = None
    bases: ServedBases = field(default_factory=ServedBases)

    @classmethod
    def of(
        cls,
        snapshot: Snapshot,
        tenant: str,
        encoder: str,
        may_find: MayFind,
        centre: Vectors | None = None,
        bases: ServedBases | None = None,
    ) -> Preferences:
        """Read the rankings of `tenant`. Ignore those of another encoder, and adapters that it may not be given."""
        better: dict[AdapterRef, AdapterRecord] = {}
        regions: list[AdapterRecord] = []
        rankings = [rank.ranking for rank in snapshot.rankings.get(tenant, ())]
        for ranking in rankings:
            if ranking.is_outcome:
                continue
            leader = _leader(ranking, snapshot, tenant, may_find)
            anchor = snapshot.records.get((ranking.anchor.tenant, ranking.anchor.name))
            if leader is None or (anchor is not None and anchor.ref != ranking.anchor):
                continue
            better |= {item.ref: leader for item in ranking.adapters if item.is_beaten}
            if anchor is None and ranking.encoder == encoder:
                embedding = Embedding(ranking.encoder, ranking.vector, ranking.own_scores)
                regions.append(replace(leader, embedding=embedding))
        vectors = [record.embedding.vector for record in regions if record.embedding is not None]
        usable = [ranking for ranking in rankings if ranking.is_outcome and ranking.encoder == encoder]
        said = [(outcome, r.vector) for r in usable for outcome in _outcomes(r, snapshot, tenant, may_find)]
        outcomes = tuple(outcome for outcome, _ in said)
        judged = _stacked([vector for _, vector in said])
        bases = bases or ServedBases()
        return cls(better, tuple(regions), _stacked(vectors), outcomes, judged, centre, bases)

    @property
    def is_empty(self) -> bool:
        """Whether they change no search result."""
        return not self.better and not self.regions and not self.outcomes

    def count_blamed(self, views: Vectors) -> int:
        """Return how many adapters the outcomes near a prompt speak against. `views`: as in `applied`."""
        return _count_blamed(self._near(views))

    def applied(
        self, views: Vectors, matches: Sequence[Match], top_k: int, tags: Sequence[str], base_model: str = ""
    ) -> list[Match]:
        """Return a view's matches with beaten adapters replaced by better ones, and those of withdrawn anchors added.

        A better adapter gets the score and the embedding of the one it replaces, since it answers that one's prompts.
        `base_model`: add only adapters of this served base model. `matches`: the best `top_k` plus `count_blamed`, so
        that the next ones take the places of excluded adapters.
        The result is sorted by score, has no weights twice and at most `top_k` matches that may answer. Excluded ones
        stay in it if they are before the last of these. `views` (V, D), of length 1: first the view that was searched,
        then the prompt's other views; outcomes near any of them count.
        """
        if self.is_empty:
            return list(matches)
        found = [self._replaced(match, tags) for match in matches]
        if self.regions:
            scores = (self.vectors @ views[0]).tolist()
            added = zip(self.regions, scores, strict=True)
            found += [Match(r, score) for r, score in added if _has_tags(r, tags) and self._belongs_to(base_model, r)]
        near = self._near(views)
        if near:
            found = self._with_outcomes(near, found, tags, base_model)
        found.sort(key=lambda match: -match.score)
        distinct: dict[str, Match] = {}
        for match in found:
            distinct.setdefault(match.record.weights_digest, match)
        kept = list[Match]()
        for match in list(distinct.values())[: top_k + _count_blamed(near)]:
            if sum(earlier.outcome >= 0 for earlier in kept) == top_k:
                break
            kept.append(match)
        return kept

    def _near(self, views: Vectors) -> list[_NearOutcome]:
        """Return the outcomes near any of these views (V, D) of a prompt, sorted by nearness to the first view."""
        if not self.outcomes:
            return []
        nearness = centred(self.judged, self.centre) @ centred(views, self.centre).T
        is_near: NDArray[np.bool_] = nearness >= NEAR_OUTCOME  # (J, V)
        cosines = (self.judged @ views[0]).tolist()  # what other scores are compared with
        rows = zip(self.outcomes, cosines, is_near, strict=True)
        near = [_NearOutcome(outcome, cosine, bool(row[0])) for outcome, cosine, row in rows if row.any()]
        return sorted(near, key=lambda item: -item.cosine)

    def _with_outcomes(
        self, near: Sequence[_NearOutcome], matches: Sequence[Match], tags: Sequence[str], base_model: str
    ) -> list[Match]:
        """Return the matches with what the outcomes say, and the adapters that those near this view praise."""
        against = sum(said.score for said, _, _ in near if said.record is None)
        sums: defaultdict[AdapterRef, float] = defaultdict(lambda: -against)
        praised: dict[AdapterRef, Match] = {}
        for said, cosine, is_of_this_view in near:
            if said.record is not None:
                sums[said.record.ref] += said.score
                if said.score > 0 and is_of_this_view and _has_tags(said.record, tags):
                    praised.setdefault(said.record.ref, Match(said.record, cosine))
        best_first = sorted(matches, key=lambda match: -match.score)  # a better adapter may be found itself, too
        found: dict[AdapterRef, Match] = {}
        for match in best_first:
            found.setdefault(match.record.ref, match)
        for ref, match in praised.items():
            is_nearer = ref not in found or match.score > found[ref].score
            if sums[ref] > 0 and is_nearer and self._belongs_to(base_model, match.record):
                found[ref] = match
        return [match._replace(outcome=sums[ref]) for ref, match in found.items()]

    def _replaced(self, match: Match, tags: Sequence[str]) -> Match:
        better = self.better.get(match.record.ref)
        own_base = self.bases.find(match.record.base_model)
        if better is None or not _has_tags(better, tags) or self.bases.find(better.base_model) != own_base:
            return match
        return match._replace(record=replace(better, embedding=match.record.embedding))

    def _belongs_to(self, base_model: str, record: AdapterRecord) -> bool:
        return not base_model or self.bases.find(record.base_model) == base_model


def _count_blamed(near: Sequence[_NearOutcome]) -> int:
    """Return how many adapters these outcomes speak against in sum."""
    sums: defaultdict[AdapterRef, float] = defaultdict(float)
    for said, _, _ in near:
        if said.record is not None:
            sums[said.record.ref] += said.score
    return sum(score < 0 for score in sums.values())


def _outcomes(ranking: Ranking, snapshot: Snapshot, tenant: str, may_find: MayFind) -> Iterator[Outcome]:
    """Yield what an outcome says about a version that is still live and that `tenant` may be given."""
    embedding = Embedding(ranking.encoder, ranking.vector, ranking.own_scores)
    for item in ranking.adapters:
        record = snapshot.records.get(item.ref.key)
        if record is not None and record.ref == item.ref and may_find(record, tenant):
            yield Outcome(replace(record, embedding=embedding), item.score)
    if not ranking.adapters:
        yield Outcome(None, 1.0)


def _stacked(vectors: Sequence[Vectors]) -> Vectors:
    return np.stack(vectors) if vectors else np.empty((0, 0), np.float32)


def _leader(ranking: Ranking, snapshot: Snapshot, tenant: str, may_find: MayFind) -> AdapterRecord | None:
    """Return the best adapter that is still live in the measured version and that `tenant` may be given, or None."""
    for ref in (item.ref for item in ranking.adapters if not item.is_beaten):
        record = snapshot.records.get(ref.key)
        if record is not None and record.ref == ref and may_find(record, tenant):
            return record
    return None


def _has_tags(record: AdapterRecord, tags: Sequence[str]) -> bool:
    return set(tags) <= set(record.tags)
