"""Examine how well a pool's adapters are retrieved, using each adapter's own samples as queries."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lora_store.adapter import AdapterRef, Sample
from lora_store.rankings import Ranking
from lora_store.records import AdapterRecord
from retriever_svc.asked_prompts import AskedReport
from retriever_svc.bulk import BulkEncoding
from retriever_svc.calibration import Abstain
from retriever_svc.encoder import Vectors
from retriever_svc.index import Allowed, Match
from retriever_svc.listing import listed
from retriever_svc.output_profile import functions_agree
from retriever_svc.pool import Pool
from retriever_svc.projection_files import ProjectionFiles
from retriever_svc.refit_gain import RefitGain, refit_gain
from retriever_svc.sample_source import SampleSource, read_samples
from retriever_svc.shared_wording import has_one_wording, num_wordings
from retriever_svc.vector_cache import SAMPLES_OWNER

FEW_SAMPLES = 10
_NEAR = 0.95  # the typical cosine of two adapters of one task that were trained on different samples
_NUM_NEIGHBOURS = 16
_MANY_SWAPPED = 0.2  # of the samples of two adapters; fewer are chance, or a few odd samples
_MANY_BELOW = 0.25  # a healthy adapter turns away far less of its own samples
_MAX_REFITTED = 512  # adapters on which a refit is tried
_MAX_REFITTED_SAMPLES = 32  # of one adapter
POINTS: tuple[Abstain, ...] = ("lenient", "balanced", "strict")


@dataclass(frozen=True, slots=True)
class AdapterFinding:
    """How well an adapter's own samples retrieve it.

    `shadowed_by`: set if no sample ranks the adapter first; the adapter that most samples rank first instead.
    """

    ref: AdapterRef
    num_samples: int
    num_first: int
    num_found: int  # among the top_k
    shadowed_by: AdapterRef | None
    turned_away: tuple[int, ...] = ()  # own samples that the adapter does not answer, at each point of `POINTS`
    num_wordings: int = 1  # ways in which the samples are worded

    @property
    def num_below(self) -> int:
        """The number of own samples that the adapter turns away at the operating point `balanced`."""
        return self.turned_away[POINTS.index("balanced")] if self.turned_away else 0


@dataclass(frozen=True, slots=True)
class Collision:
    """Two adapters with nearly equal embeddings, or which each have samples that rank the other first.

    `is_inseparable`: prompts cannot distinguish them. `agree`: their sample outputs show the same function.
    """

    first: AdapterRef
    second: AdapterRef
    cosine: float
    num_of_first: int  # samples of `first` that rank `second` first
    num_of_second: int
    is_inseparable: bool = False
    agree: bool = False


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """The result of an examination.

    `never_chosen`: adapters in the top_k of no sample of the pool. `unreadable`: adapters whose samples could not be
    read. `rankings`: the results of the tenant's last evaluation. `refit`: what a projection fitted to these samples
    would change. `unserved`: adapters that were made for another base model, by its name. `by_name_only`: the tenant's
    adapters without samples. `unembedded`: the listed adapters whose samples the encoder in service has not embedded.
    `asked`: who answers the prompts that the caller gave. Samples contribute to their adapter's embedding, so the
    shares are higher than for unseen prompts.
    """

    generation: int
    top_k: int
    adapters: tuple[AdapterFinding, ...]
    collisions: tuple[Collision, ...]
    never_chosen: tuple[AdapterRef, ...]
    unreadable: tuple[AdapterRef, ...]
    rankings: tuple[Ranking, ...] = ()
    refit: RefitGain | None = None
    unserved: Mapping[str, tuple[AdapterRef, ...]] = field(default_factory=dict)
    by_name_only: tuple[AdapterRef, ...] = ()
    unembedded: tuple[AdapterRef, ...] = ()
    asked: AskedReport | None = None

    @property
    def share_first(self) -> float:
        """The share of all samples that rank their own adapter first."""
        return sum(a.num_first for a in self.adapters) / max(1, sum(a.num_samples for a in self.adapters))

    @property
    def share_found(self) -> float:
        """The share of all samples that have their own adapter in the top_k."""
        return sum(a.num_found for a in self.adapters) / max(1, sum(a.num_samples for a in self.adapters))

    @property
    def turned_away(self) -> dict[Abstain, float]:
        """The share of all samples that their adapter would not answer, each compared with the others, by point."""
        measured = [adapter for adapter in self.adapters if adapter.turned_away]
        total = max(1, sum(adapter.num_samples for adapter in measured))
        return {
            point: sum(adapter.turned_away[place] for adapter in measured) / total for place, point in enumerate(POINTS)
        }

    @property
    def always_shadowed(self) -> tuple[AdapterFinding, ...]:
        """The adapters that none of their own samples rank first."""
        return tuple(adapter for adapter in self.adapters if adapter.shadowed_by is not None)

    @property
    def with_few_samples(self) -> tuple[AdapterFinding, ...]:
        """The adapters with fewer than `FEW_SAMPLES` samples."""
        return tuple(adapter for adapter in self.adapters if adapter.num_samples < FEW_SAMPLES)

    @property
    def with_unlike_samples(self) -> tuple[AdapterFinding, ...]:
        """The adapters that would turn away a quarter of their own samples."""
        return tuple(a for a in self.adapters if a.num_below >= 2 and a.num_below >= _MANY_BELOW * a.num_samples)

    @property
    def with_one_wording(self) -> tuple[AdapterFinding, ...]:
        """The adapters whose samples repeat one instruction. Prompts in other words find them less often."""
        return tuple(a for a in self.adapters if has_one_wording(a.num_samples, a.num_wordings))


@dataclass(frozen=True, slots=True)
class DoctorStep:
    """Progress: `num_done` of `num_total` adapters and prompts are examined. The last step has the report."""

    num_done: int
    num_total: int
    report: DoctorReport | None = None


def examine(
    pool: Pool, tenant: str, samples: SampleSource, top_k: int = 3, projections: ProjectionFiles | None = None
) -> Iterator[DoctorStep]:
    """Query with every sample of the adapters that `auto` may choose for `tenant`. Yield a step per adapter.

    With `projections`, measure what a refit of the projection would change.
    """
    visible = sorted(pool.snapshot.visible_to(tenant), key=lambda record: record.ref.key)
    examination = _Examination(pool, tenant, pool.allowed(tenant), top_k, visible)
    embedded = [record for record in visible if record.encoder == pool.encoder.identity]
    records = [record for record in embedded if pool.may_find(record, tenant)]
    refitted = _evenly(len(records)) if projections is not None else frozenset()
    for number, record in enumerate(records, start=1):
        examination.add(record, read_samples(samples, record), keeps_vectors=number - 1 in refitted)
        yield DoctorStep(number, len(records))
    yield DoctorStep(len(records), len(records), examination.report(records, projections))


def _evenly(num_records: int) -> frozenset[int]:
    """Return the places of at most `_MAX_REFITTED` records, evenly spread."""
    num = min(num_records, _MAX_REFITTED)
    return frozenset(place * num_records // num for place in range(num))


@dataclass
class _Examination:
    """Collects the findings of one examination."""

    pool: Pool
    tenant: str
    allowed: Allowed
    top_k: int
    visible: Sequence[AdapterRecord]
    findings: list[AdapterFinding] = field(default_factory=list)
    unreadable: list[AdapterRef] = field(default_factory=list)
    chosen: set[AdapterRef] = field(default_factory=set)
    firsts: Counter[tuple[AdapterRef, AdapterRef]] = field(default_factory=Counter)  # (owner of sample, ranked first)
    counts: Counter[AdapterRef] = field(default_factory=Counter)  # of samples
    near: set[tuple[AdapterRef, AdapterRef]] = field(default_factory=set)
    kept: list[tuple[Vectors, list[str]]] = field(default_factory=list)  # (vectors before the projection, texts)

    def add(self, record: AdapterRecord, samples: Sequence[Sample] | None, *, keeps_vectors: bool) -> None:
        """Query with the adapter's samples and record the findings. `samples`: None if they cannot be read."""
        self._find_near(record)
        if samples is None:
            self.unreadable.append(record.ref)
            return
        texts = [sample.input for sample in samples]
        encoding = BulkEncoding(self.pool.encoder, texts, [SAMPLES_OWNER] * len(texts))
        vectors = encoding.encode_all()
        if keeps_vectors:
            self.kept.append((encoding.plain_vectors()[:_MAX_REFITTED_SAMPLES], texts[:_MAX_REFITTED_SAMPLES]))
        found = self._found(vectors)
        firsts = Counter(refs[0] for refs in found)
        self.chosen.update(ref for refs in found for ref in refs)
        self.firsts.update({(record.ref, ref): count for ref, count in firsts.items()})
        num_found = sum(record.ref in refs for refs in found)
        shadow = firsts.most_common(1)[0][0] if found and not firsts[record.ref] else None
        self.counts[record.ref] = len(found)
        counts = len(found), firsts[record.ref], num_found
        turned_away, wordings = self._turned_away(record, vectors), num_wordings(texts)
        self.findings.append(AdapterFinding(record.ref, *counts, shadow, turned_away, wordings))

    def _found(self, vectors: Vectors) -> list[list[AdapterRef]]:
        """Return the adapters that each vector finds, best first: as in a plan, all of the best one's base model."""
        rows = self.pool.index.search(vectors, self.top_k, self.allowed)
        bases = self.pool.bases
        for place, row in enumerate(rows if bases.are_several else ()):
            found = [bases.name_in_plans(match.record.base_model) for match in row]
            if len(set(found)) > 1:
                own = self.pool.allowed(self.tenant, base_model=found[0])
                rows[place] = self.pool.index.search(vectors[place : place + 1], self.top_k, own)[0]
        return [[match.record.ref for match in row] for row in rows]

    def _turned_away(self, record: AdapterRecord, vectors: Vectors) -> tuple[int, ...]:
        """Return how many of the samples (S, D), each compared with the others, the adapter would not answer."""
        assert record.embedding is not None
        scores = record.embedding.own_scores.tolist()
        if len(scores) != len(vectors):
            return ()  # a single sample has none to be compared with
        own = [[Match(record, score)] for score in scores]
        judged = (self.pool.judged(own, point, vectors) for point in POINTS)
        return tuple(sum(not match.fits for [match] in rows) for rows in judged)

    def _find_near(self, record: AdapterRecord) -> None:
        assert record.embedding is not None
        [matches] = self.pool.index.search(record.embedding.vector[np.newaxis], _NUM_NEIGHBOURS, self.allowed)
        for match in matches:
            if match.record.ref != record.ref and match.score >= _NEAR:
                self.near.add(_pair(record.ref, match.record.ref))

    def _collision(self, a: AdapterRef, b: AdapterRef, records: dict[AdapterRef, AdapterRecord]) -> Collision:
        first, second = records[a].embedding, records[b].embedding
        assert first is not None and second is not None
        cosine, swapped = float(first.vector @ second.vector), self.firsts[a, b] + self.firsts[b, a]
        num_samples = self.counts[a] + self.counts[b]
        inseparable = cosine >= _NEAR or swapped >= _MANY_SWAPPED * num_samples
        agree = functions_agree(first.outputs, second.outputs)
        return Collision(a, b, cosine, self.firsts[a, b], self.firsts[b, a], inseparable, agree)

    def report(self, records: Sequence[AdapterRecord], projections: ProjectionFiles | None) -> DoctorReport:
        """Return the report on these records, all of which were added."""
        swapped = {_pair(a, b) for a, b in self.firsts if a != b and (b, a) in self.firsts}
        by_ref = {record.ref: record for record in records}
        collisions = [self._collision(a, b, by_ref) for a, b in swapped | self.near]
        encoder, kept = self.pool.encoder, self.kept
        ranks = self.pool.snapshot.rankings.get(self.tenant, ())
        refit = None
        if projections is not None:
            groups, texts = [vectors for vectors, _ in kept], [own for _, own in kept]
            refit = refit_gain(encoder, groups, texts, projections.shipped(encoder.identity))
        return DoctorReport(
            generation=self.pool.snapshot.generation_for(self.tenant),
            top_k=self.top_k,
            adapters=tuple(self.findings),
            collisions=tuple(sorted(collisions, key=lambda c: (-c.cosine, str(c.first), str(c.second)))),
            never_chosen=tuple(record.ref for record in records if record.ref not in self.chosen),
            unreadable=tuple(self.unreadable),
            rankings=tuple(rank.ranking for rank in ranks if not rank.ranking.is_outcome),
            refit=refit,
            unserved=self._unserved(),
            by_name_only=self._by_name_only(),
            unembedded=self._unembedded(),
        )

    def _unembedded(self) -> tuple[AdapterRef, ...]:
        """Return the adapters that `auto` could choose for the tenant, if its encoder had embedded their samples."""
        usable = [record for record in self.visible if self.pool.may_find(record, self.tenant)]
        return tuple(r.ref for r in usable if r.num_samples and r.encoder != self.pool.encoder.identity)

    def _by_name_only(self) -> tuple[AdapterRef, ...]:
        """Return the tenant's served adapters that have no samples, without those that no list shows."""
        served = filter(self.pool.bases.serves, listed(self.visible, self.tenant))
        own = (record for record in served if record.ref.tenant == self.tenant)
        return tuple(record.ref for record in own if record.embedding is None and not record.num_samples)

    def _unserved(self) -> dict[str, tuple[AdapterRef, ...]]:
        """Return the listed adapters that the tenant sees and that are not served, by the name of their base model."""
        found: defaultdict[str, list[AdapterRef]] = defaultdict(list)
        for record in listed(self.visible, self.tenant):
            if not self.pool.bases.serves(record):
                found[record.base_model].append(record.ref)
        return {base_model: tuple(found[base_model]) for base_model in sorted(found)}


def _pair(a: AdapterRef, b: AdapterRef) -> tuple[AdapterRef, AdapterRef]:
    return (a, b) if (a.tenant, a.name) < (b.tenant, b.name) else (b, a)
