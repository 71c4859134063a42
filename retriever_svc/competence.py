"""Measure which adapters answer the examples of a region best, by successive halving.

A region is the neighbourhood of one adapter, its anchor, whose samples have outputs. Candidates are the anchor, the
adapters near it, and adapters without samples, which no search can find, all of the anchor's base model.

Only trusted anchors have regions: the tenant's own adapters, and public ones that an admin approved. So another tenant
cannot choose the examples by which a tenant's adapters are judged. Only the tenant that measured a ranking uses it. An
adapter with a region of its own is judged by its own examples, because a near adapter may do something else with the
same inputs. There is one exception: two adapters that have the same small set of labels and contradict each other, such
as a copy trained on flipped labels. Then the approved one is right, or else the one that was published first.

Source: successive halving as in LORAUTER (arXiv 2601.21795).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

import numpy as np

from lora_store.adapter import AdapterRef, Sample
from lora_store.rankings import RankedAdapter, Ranking
from lora_store.records import AdapterRecord, OutputProfile
from retriever_svc.output_profile import MIN_OUTPUTS, functions_agree
from retriever_svc.pool import Pool
from retriever_svc.sample_source import SampleSource, read_samples

# Cosine of an adapter to the anchor. On the tune pools of `python -m benchmarks.routing.wording` nine of ten adapters
# of one task in other words reach it, and one in forty of other tasks.
NEAR = 0.65
MAX_NEAR = 8  # of all, and as many of the trusted ones
MAX_WITHOUT_SAMPLES = 32
MAX_EXAMPLES = 32
FIRST_ROUND = 4  # examples; each further round has twice as many
MIN_LEAD = 0.2  # by which a mean score must be higher to be clearly better
MIN_SCORE = 0.3  # of an adapter that may answer for the region
_ERRORS = 1.64  # standard errors: 5 % one-sided


class Scorer(Protocol):
    """Runs an adapter on examples."""

    async def scores(self, adapter: AdapterRecord, examples: Sequence[Sample]) -> Sequence[float]:
        """Return one score from 0 to 1 for each example, such as 1 for an answer equal to its output."""
        ...

    async def can_score(self, adapter: AdapterRecord) -> bool:
        """Return whether adapters of the base model of this one can be run now."""
        return True


@dataclass(frozen=True, slots=True)
class Region:
    """An anchor, its examples, and the adapters that compete on them, the anchor first.

    `judged`: the adapters that these examples may disqualify.
    """

    anchor: AdapterRecord
    candidates: tuple[AdapterRecord, ...]
    examples: tuple[Sample, ...]
    judged: frozenset[AdapterRef]


def find_regions(pool: Pool, tenant: str, samples: SampleSource) -> Iterator[Region]:
    """Yield the regions of `tenant`. Approved anchors come first, then those that were published first.

    Samples are read when their region is asked for, since the caller may leave a large pool.
    """
    usable = [r for r in pool.snapshot.visible_to(tenant) if pool.may_find(r, tenant)]
    trusted = [r for r in usable if r.encoder == pool.encoder.identity and (r.approved or r.ref.tenant == tenant)]
    trusted.sort(key=lambda r: (not r.approved, r.created_at, r.ref.tenant, r.ref.name))
    places = {record.ref: place for place, record in enumerate(trusted)}
    given: dict[AdapterRef, tuple[Sample, ...]] = {}

    def is_anchor(record: AdapterRecord) -> bool:
        if record.ref not in given:
            given[record.ref] = _examples(read_samples(samples, record) or ())
        return len(given[record.ref]) >= MIN_OUTPUTS

    def is_judged(anchor: AdapterRecord, other: AdapterRecord) -> bool:
        """Return whether the anchor's examples may disqualify `other`."""
        if other.ref not in places or not is_anchor(other):
            return True
        first, second = _find_outputs(anchor), _find_outputs(other)
        has_labels = first is not None and bool(first.labels)
        return places[anchor.ref] < places[other.ref] and has_labels and functions_agree(first, second)

    unsampled = [record for record in usable if not record.num_samples]
    unsampled.sort(key=lambda r: (r.ref.tenant != tenant, not r.approved, r.ref.key))  # own first, then approved ones
    for anchor in filter(is_anchor, trusted):
        near, base_model = _near(pool, tenant, anchor), pool.bases.find(anchor.base_model)
        judged = {r.ref for r in near if is_judged(anchor, r)} | {anchor.ref}
        others = [r for r in unsampled if pool.bases.find(r.base_model) == base_model][:MAX_WITHOUT_SAMPLES]
        yield Region(anchor, (anchor, *near, *others), given[anchor.ref], frozenset(judged))


def _find_outputs(record: AdapterRecord) -> OutputProfile | None:
    return None if record.embedding is None else record.embedding.outputs


def _near(pool: Pool, tenant: str, anchor: AdapterRecord) -> list[AdapterRecord]:
    """Return the nearest adapters.

    Include the nearest trusted adapters even if many untrusted ones are nearer.
    """
    assert anchor.embedding is not None, "an anchor is embedded"
    vectors = anchor.embedding.vector[np.newaxis]
    near: dict[AdapterRef, AdapterRecord] = {}
    base_model = pool.bases.name_in_plans(anchor.base_model)
    for trusted_only in (False, True):
        allowed = pool.allowed(tenant, trusted_only=trusted_only, base_model=base_model)
        [matches] = pool.index.search(vectors, MAX_NEAR + 1, allowed)
        others = [match.record for match in matches if match.record.ref != anchor.ref and match.score >= NEAR]
        near |= {record.ref: record for record in others[:MAX_NEAR]}
    return list(near.values())


def _examples(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """Return at most `MAX_EXAMPLES` samples with outputs, in an order that does not depend on that of the file."""
    given = {sample for sample in samples if sample.output is not None and sample.output.strip()}
    ordered = sorted(given, key=lambda sample: sha256(f"{sample.input}\0{sample.output}".encode()).digest())
    return tuple(ordered[:MAX_EXAMPLES])


async def rank(region: Region, scorer: Scorer) -> Ranking | None:
    """Return the ranking of the region's candidates, None if no adapter answers well enough.

    Each round scores the remaining adapters on further examples and keeps the better half, and always the anchor.
    """
    scored: dict[AdapterRef, list[float]] = {record.ref: [] for record in region.candidates}
    remaining, done, size = list(region.candidates), 0, FIRST_ROUND
    while done < len(region.examples) and len(remaining) > 1:
        batch = region.examples[done : done + size]
        for record in remaining:
            scored[record.ref] += await scorer.scores(record, batch)
        done, size = done + len(batch), 2 * size
        if done < len(region.examples):
            remaining = _better_half(region.anchor, remaining, scored)
    return _ranking(region, scored) if len(region.candidates) > 1 else None


def _better_half(
    anchor: AdapterRecord, records: Sequence[AdapterRecord], scored: dict[AdapterRef, list[float]]
) -> list[AdapterRecord]:
    """Return the anchor and the better half of the others; ties keep their order."""
    others = sorted(records[1:], key=lambda record: -statistics.fmean(scored[record.ref]))
    return [anchor, *others[: math.ceil(len(others) / 2)]]


def _ranking(region: Region, scored: dict[AdapterRef, list[float]]) -> Ranking | None:
    whole = max(map(len, scored.values()))
    finalists = [record.ref for record in region.candidates if len(scored[record.ref]) == whole]
    best = max(finalists, key=lambda ref: statistics.fmean(scored[ref]))  # the anchor if it ties
    if statistics.fmean(scored[best]) < MIN_SCORE:
        return None
    unsampled = {record.ref for record in region.candidates if not record.num_samples}
    ranked = []
    for record in region.candidates:
        own = scored[record.ref]
        is_beaten = record.ref in region.judged and is_clearly_better(scored[best], own)
        is_extra = record.ref in unsampled and _may_lead(own, scored[best])
        if is_beaten or is_extra or record.ref in (best, region.anchor.ref):
            ranked.append(RankedAdapter(record.ref, statistics.fmean(own), len(own), is_beaten))
    ranked.sort(key=lambda item: -item.score)
    embedding = region.anchor.embedding
    assert embedding is not None, "an anchor is embedded"
    return Ranking(region.anchor.ref, tuple(ranked), embedding.encoder, embedding.vector, embedding.own_scores)


def _may_lead(scores: Sequence[float], best: Sequence[float]) -> bool:
    return statistics.fmean(scores) >= MIN_SCORE and not is_clearly_better(best, scores)


def is_clearly_better(first: Sequence[float], second: Sequence[float]) -> bool:
    """Return whether the first adapter scores clearly higher on the examples that both answered, which come first.

    The mean difference must be at least `MIN_LEAD` and exceed 1.64 of its standard errors.
    """
    differences = [a - b for a, b in zip(first, second, strict=False)]
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return mean >= MIN_LEAD and mean > _ERRORS * error


async def evaluate(regions: Sequence[Region], scorer: Scorer) -> AsyncGenerator[Ranking | AdapterRef | None]:
    """Yield the ranking of each region, in order; None if nothing was measured, its anchor if it cannot be now.

    An adapter that an earlier region disqualified has no region of its own.
    """
    beaten: set[AdapterRef] = set()
    for region in regions:
        if not await scorer.can_score(region.anchor):
            yield region.anchor.ref
            continue
        ranking = None if region.anchor.ref in beaten else await rank(region, scorer)
        beaten |= set() if ranking is None else {item.ref for item in ranking.adapters if item.is_beaten}
        yield ranking
