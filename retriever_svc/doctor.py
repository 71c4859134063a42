"""How well a pool's adapters are found: each is asked for by its own samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from lora_store.adapter import AdapterRef, Sample
from lora_store.records import AdapterRecord
from retriever_svc.bulk import BulkEncoding
from retriever_svc.index import Allowed
from retriever_svc.pool import Pool
from retriever_svc.sample_source import SampleSource, read_samples

_NEAR = 0.95  # two adapters of one task, trained on different samples of it, lie about so near
_NUM_NEIGHBOURS = 16


@dataclass(frozen=True, slots=True)
class AdapterFinding:
    """How an adapter's own samples find it. `shadowed_by`: no sample puts it first, and most put this one there."""

    ref: AdapterRef
    num_samples: int
    num_first: int
    num_found: int  # among the top_k
    shadowed_by: AdapterRef | None


@dataclass(frozen=True, slots=True)
class Collision:
    """Two adapters that lie nearly at one place, or of which each has samples that put the other first."""

    first: AdapterRef
    second: AdapterRef
    cosine: float
    num_of_first: int  # samples of `first` that put `second` first
    num_of_second: int


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """`never_chosen` are among the top_k of no sample of the pool; the samples of `unreadable` could not be asked.

    An adapter's samples are part of its embedding, so shares are better than those of prompts it never saw.
    """

    generation: int
    top_k: int
    adapters: tuple[AdapterFinding, ...]
    collisions: tuple[Collision, ...]
    never_chosen: tuple[AdapterRef, ...]
    unreadable: tuple[AdapterRef, ...]

    @property
    def share_first(self) -> float:
        """Of all samples, those that put their own adapter first."""
        return sum(a.num_first for a in self.adapters) / max(1, sum(a.num_samples for a in self.adapters))

    @property
    def share_found(self) -> float:
        """Of all samples, those that find their own adapter among the top_k."""
        return sum(a.num_found for a in self.adapters) / max(1, sum(a.num_samples for a in self.adapters))

    @property
    def always_shadowed(self) -> tuple[AdapterFinding, ...]:
        return tuple(adapter for adapter in self.adapters if adapter.shadowed_by is not None)


@dataclass(frozen=True, slots=True)
class DoctorStep:
    """`num_done` of `num_total` adapters are examined; the last step has the report."""

    num_done: int
    num_total: int
    report: DoctorReport | None = None


def examine(pool: Pool, tenant: str, samples: SampleSource, top_k: int = 3) -> Iterator[DoctorStep]:
    """Ask by every sample of what `auto` may choose for `tenant`, a step for each adapter, and report on the whole."""
    examination = _Examination(pool, tenant, pool.allowed(tenant), top_k)
    embedded = [record for record in pool.snapshot.visible_to(tenant) if record.encoder == pool.encoder.identity]
    records = [record for record in embedded if pool.index.offers(record, tenant)]
    for number, record in enumerate(records, start=1):
        examination.ask_by(record, read_samples(samples, record))
        yield DoctorStep(number, len(records))
    yield DoctorStep(len(records), len(records), examination.report(records))


@dataclass
class _Examination:
    pool: Pool
    tenant: str
    allowed: Allowed
    top_k: int
    findings: list[AdapterFinding] = field(default_factory=list)
    unreadable: list[AdapterRef] = field(default_factory=list)
    chosen: set[AdapterRef] = field(default_factory=set)
    firsts: Counter[tuple[AdapterRef, AdapterRef]] = field(default_factory=Counter)  # (whose sample, put first)
    near: set[tuple[AdapterRef, AdapterRef]] = field(default_factory=set)

    def ask_by(self, record: AdapterRecord, samples: Sequence[Sample] | None) -> None:
        self._look_around(record)
        if samples is None:
            self.unreadable.append(record.ref)
            return
        texts = [sample.input for sample in samples]
        vectors = BulkEncoding(self.pool.encoder, texts, [self.tenant] * len(texts)).encode_all()
        found = [[m.record.ref for m in row] for row in self.pool.index.search(vectors, self.top_k, self.allowed)]
        firsts = Counter(refs[0] for refs in found)
        self.chosen.update(ref for refs in found for ref in refs)
        self.firsts.update({(record.ref, ref): count for ref, count in firsts.items()})
        num_found = sum(record.ref in refs for refs in found)
        shadow = firsts.most_common(1)[0][0] if found and not firsts[record.ref] else None
        self.findings.append(AdapterFinding(record.ref, len(found), firsts[record.ref], num_found, shadow))

    def _look_around(self, record: AdapterRecord) -> None:
        assert record.embedding is not None
        [matches] = self.pool.index.search(record.embedding.vector[np.newaxis], _NUM_NEIGHBOURS, self.allowed)
        for match in matches:
            if match.record.ref != record.ref and match.score >= _NEAR:
                self.near.add(_pair(record.ref, match.record.ref))

    def report(self, records: Sequence[AdapterRecord]) -> DoctorReport:
        swapped = {_pair(a, b) for a, b in self.firsts if a != b and (b, a) in self.firsts}
        vectors = {record.ref: record.embedding.vector for record in records if record.embedding is not None}
        collisions = [
            Collision(a, b, float(vectors[a] @ vectors[b]), self.firsts[a, b], self.firsts[b, a])
            for a, b in swapped | self.near
        ]
        return DoctorReport(
            generation=self.pool.snapshot.generation_for(self.tenant),
            top_k=self.top_k,
            adapters=tuple(self.findings),
            collisions=tuple(sorted(collisions, key=lambda c: (-c.cosine, str(c.first), str(c.second)))),
            never_chosen=tuple(record.ref for record in records if record.ref not in self.chosen),
            unreadable=tuple(self.unreadable),
        )


def _pair(a: AdapterRef, b: AdapterRef) -> tuple[AdapterRef, AdapterRef]:
    return (a, b) if (a.tenant, a.name) < (b.tenant, b.name) else (b, a)
