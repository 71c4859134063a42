"""Learn from clients: accepted prompts as samples, and outcomes as choices of one tenant.

An accepted prompt is a row of its adapter's samples, so it moves the adapter's vector a little. An outcome says how an
adapter answered one prompt. It counts for that tenant's prompts that are nearly the same, and nowhere else.

Both are bounded: accepted prompts are at most a quarter of the rows, and one key has at most `MAX_PER_KEY` outcomes for
an adapter. Both are *checked* before they apply: the samples that the publishers chose must still find their adapters,
and ordinary prompts must still go to the base model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from lora_store.adapter import AdapterRef, Sample
from lora_store.bounded_files import Limits
from lora_store.errors import AdapterNotFound
from lora_store.events import Rank
from lora_store.feedback import MAX_PER_KEY, Feedback
from lora_store.rankings import OUTCOME, RankedAdapter, Ranking
from lora_store.records import AdapterRecord
from lora_store.sample_files import checked_sample
from lora_store.snapshot import Key, Snapshot
from retriever_svc.bulk import BulkEncoding
from retriever_svc.calibration import Abstain
from retriever_svc.embedding import embed_groups
from retriever_svc.encoder import Vectors
from retriever_svc.index import IndexSettings, Match
from retriever_svc.ordinary_prompts import nearness_to_others, split_bare_words
from retriever_svc.pool import Pool
from retriever_svc.sample_source import SampleSource, read_samples
from retriever_svc.vector_cache import SAMPLES_OWNER

NEAR_COPY = 0.95
OWN_PER_ACCEPTED = 3  # rows of the publisher for each accepted one, which is at most a quarter of all
MAX_OUTCOMES = 64  # more of a tenant have no effect
MAX_LOST = 0.01  # of the publishers' samples that no longer find their adapter
MAX_ANSWERED = 0.02  # of ordinary prompts that an adapter answers
_NUM_CHECKED = 16  # nearest adapters of each changed one whose samples are asked
_MAX_SAMPLES = 32  # of one adapter that are asked
_NUM_COMPARED = 3  # adapters that compete for a prompt
_MAX_CHECKS = 16  # of outcomes in one call; one harmful outcome of 64 takes 13
Refused = tuple[Ranking, frozenset[AdapterRef | Ranking]]  # an outcome, with the adapters and evaluations near it


@dataclass(frozen=True, slots=True)
class Effect:
    """What a change does to the publishers' samples, and to ordinary prompts: to bare words or to the rest of them.

    Both groups are checked. This one is refused, or else it is the one of which adapters answer the larger share.
    """

    num_samples: int
    found_before: int
    found_after: int
    num_ordinary: int
    answered_before: int
    answered_after: int

    @property
    def answered_share(self) -> float:
        """The share of the ordinary prompts that adapters answer after the change."""
        return self.answered_after / max(1, self.num_ordinary)

    @property
    def refusal(self) -> str | None:
        """Why the change must not apply, None if it may."""
        lost = self.found_before - self.found_after
        if lost > 0 and lost >= MAX_LOST * self.num_samples:
            samples = f"{lost} of {self.num_samples} samples of this adapter and of similar adapters"
            return f"{samples} would no longer find their adapter"
        if self.answered_after > self.answered_before and self.answered_after >= MAX_ANSWERED * self.num_ordinary:
            return f"adapters would answer {self.answered_after} of {self.num_ordinary} ordinary prompts"
        return None


@dataclass(frozen=True, slots=True)
class Resampled:
    """The samples of an adapter with accepted prompts, and the effect.

    `left_out`: prompts that are near-copies of a sample, or blank, and those beyond the largest number of accepted ones
    or of samples.
    """

    samples: tuple[Sample, ...]
    left_out: tuple[str, ...]
    effect: Effect


@dataclass(frozen=True, slots=True)
class Learnt:
    """The choices that a tenant's outcomes lead to. `num_left`: outcomes that the next call checks."""

    rankings: tuple[Ranking, ...]
    num_refused: int = 0  # outcomes that would harm samples
    num_left: int = 0


def accept(
    pool: Pool,
    live: AdapterRecord,
    texts: Sequence[str],
    samples: SampleSource,
    abstain: Abstain,
    min_score: float | None = None,
    limits: Limits | None = None,
) -> Resampled:
    """Return the samples of the live version with these prompts, the newest first, among its accepted rows.

    New prompts push out the oldest accepted ones. `min_score` overrides every threshold. `limits`: of samples.
    Raises: AdapterNotFound, BlobCorrupted, StoreUnavailable.
    """
    limits, own = limits or Limits(), list(samples(live))
    given = [sample for sample in own if not sample.is_accepted]
    earlier = [sample for sample in own if sample.is_accepted]
    wanted, left_out = _split_usable(texts, limits)
    vectors = _encoded(pool, [sample.input for sample in own + wanted], live.ref.tenant)
    rows, new = list(vectors[: len(own)]), list[Sample]()
    for sample, vector in zip(wanted, vectors[len(own) :], strict=True):
        if max((float(row @ vector) for row in rows), default=0.0) > NEAR_COPY:
            left_out.append(sample.input)
        else:
            rows.append(vector)
            new.append(sample)
    num_accepted = max(0, min(len(given) // OWN_PER_ACCEPTED, limits.max_samples - len(given)))
    left_out += [sample.input for sample in new[num_accepted:]]
    changed = (*given, *[*new, *earlier][:num_accepted])
    [embedding] = embed_groups(pool.encoder, [changed], [live.ref.tenant])
    check = _Check(pool, live.ref.tenant, abstain, min_score, samples)
    effect = check.embedding_effect(replace(live, embedding=embedding))
    return Resampled(changed, tuple(left_out), effect)


def _split_usable(texts: Iterable[str], limits: Limits) -> tuple[list[Sample], list[str]]:
    """Return accepted samples of these prompts, cut as a publisher's are, and the prompts that can be none."""
    usable, others = list[Sample](), list[str]()
    for text in texts:
        try:
            usable.append(replace(checked_sample(text, None, limits.max_sample_bytes), is_accepted=True))
        except ValueError:
            others.append(text)
    return usable, others


def without_accepted(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """Return the samples that the publisher gave."""
    return tuple(sample for sample in samples if not sample.is_accepted)


def learn(
    pool: Pool,
    tenant: str,
    outcomes: Sequence[Feedback],
    samples: SampleSource,
    abstain: Abstain,
    min_score: float | None = None,
    refused: set[Refused] | None = None,
) -> Learnt:
    """Return the choices of a tenant from its outcomes, which are given newest first.

    A positive outcome names the adapter for prompts that are nearly the same. A negative one takes the adapter away
    from them; one that praises the base model takes every adapter away. Keep those that apply already, unless they do
    harm without those that are withdrawn. Check the others beside them. Leave out those that are refused, and for the
    next call those that `_MAX_CHECKS` did not reach.

    `refused`: the outcomes that this tenant's earlier call refused, which are not checked again until an applied one is
    withdrawn. It is updated.
    """
    said = {outcome: tuple(_said(pool, tenant, outcome)) for outcome in outcomes}
    chosen = _bounded(outcome for outcome in outcomes if said[outcome] or outcome.adapter is None)
    vectors = _encoded(pool, [outcome.text for outcome in chosen], tenant)
    none = np.empty(0, np.float32)
    rankings = []
    for outcome, vector in zip(chosen, vectors, strict=True):
        adapters = tuple(RankedAdapter(ref, outcome.score, 1, is_beaten) for ref, is_beaten in said[outcome])
        anchor = AdapterRef(tenant, f"{OUTCOME}{outcome.id}", "")
        rankings.append(Ranking(anchor, adapters, pool.encoder.identity, vector, none))
    check = _Check(pool, tenant, abstain, min_score, samples)
    refused = set() if refused is None else refused
    ranks = pool.snapshot.rankings.get(tenant, ())
    applied = {rank.ranking: rank.ranking for rank in ranks if rank.ranking.is_outcome}
    # A client may send the id of a request again. The checked vector stays, so that many small steps lead nowhere.
    kept = [applied[new] for new in rankings if new in applied and new.vector @ applied[new].vector > NEAR_COPY]
    gone = [ranking for ranking in applied if ranking not in kept and ranking.encoder == pool.encoder.identity]
    if gone:
        refused.clear()  # they may apply without those that are withdrawn
    if gone and check.outcomes_effect(kept, gone).refusal is not None:
        kept = []  # a withdrawn one outweighed others
    known = {ranking: (ranking, check.surroundings(ranking)) for ranking in rankings if ranking not in kept}
    refused &= set(known.values())
    new = [ranking for ranking, checked in known.items() if checked not in refused]
    kept, harmful = _split_harmful(check, kept, new)
    refused |= {known[ranking] for ranking in harmful}
    num_left = len(rankings) - len(kept) - len(refused)
    found = {ranking: ranking for ranking in kept}
    return Learnt(tuple(found[ranking] for ranking in rankings if ranking in found), len(refused), num_left)


def _split_harmful(
    check: _Check, applied: Sequence[Ranking], new: list[Ranking]
) -> tuple[list[Ranking], list[Ranking]]:
    """Return those that may apply, and those that are refused alone beside them. Halve groups that are refused."""
    waiting, kept, harmful = [new] if new else [], list(applied), list[Ranking]()
    for _ in range(_MAX_CHECKS):
        if not waiting:
            break
        group = waiting.pop()
        middle = len(group) // 2
        if check.outcomes_effect([*kept, *group], group).refusal is None:
            kept += group
        elif middle:
            waiting += [group[middle:], group[:middle]]
        else:
            harmful += group
    return kept, harmful


def _bounded(outcomes: Iterable[Feedback]) -> list[Feedback]:
    """Return the outcomes that may apply, at most `MAX_PER_KEY` of a key for an adapter, in the given order.

    The keys take turns at the places, each with its newest outcome that has none.
    """
    counts: Counter[tuple[str, str | None]] = Counter()
    turns: Counter[str] = Counter()
    waiting = list[tuple[int, int, Feedback]]()
    for number, outcome in enumerate(outcomes):
        says_nothing = outcome.score == 0 or (outcome.adapter is None and outcome.score < 0)
        if says_nothing or counts[outcome.key_id, outcome.adapter] == MAX_PER_KEY:
            continue
        counts[outcome.key_id, outcome.adapter] += 1
        waiting.append((turns[outcome.key_id], number, outcome))
        turns[outcome.key_id] += 1
    chosen = sorted((number, outcome) for _, number, outcome in sorted(waiting)[:MAX_OUTCOMES])
    return [outcome for _, outcome in chosen]


def _said(pool: Pool, tenant: str, outcome: Feedback) -> Iterator[tuple[AdapterRef, bool]]:
    """Yield the live version of the adapter that an outcome names, and whether it should not answer."""
    if outcome.adapter is None:
        return
    try:
        record = pool.snapshot.resolve(tenant, outcome.adapter)
    except AdapterNotFound:
        return
    if pool.may_find(record, tenant):
        yield record.ref, outcome.score < 0


def _encoded(pool: Pool, texts: Sequence[str], owner: str) -> Vectors:
    return BulkEncoding(pool.encoder, texts, [owner] * len(texts)).encode_all()


@dataclass(frozen=True, slots=True, eq=False)
class _Before:
    """The publishers' samples (N, D) of some adapters, and what finds its adapter without the change."""

    queries: Vectors
    owners: list[Key]
    num_found: int
    answered: NDArray[np.bool_]  # (J,) of the ordinary prompts


@dataclass(frozen=True, slots=True)
class _Check:
    """Asks the samples of changed adapters and of those near them, before and after a change.

    `last`: the answers before the change of the last adapters that were asked, since several changes are near the same.
    `read`: the vectors of the samples of each adapter that was asked.
    """

    pool: Pool
    tenant: str
    abstain: Abstain
    min_score: float | None
    samples: SampleSource
    last: dict[tuple[frozenset[Key], frozenset[Key]], _Before] = field(default_factory=dict)
    read: dict[Key, Vectors] = field(default_factory=dict)

    def surroundings(self, ranking: Ranking) -> frozenset[AdapterRef | Ranking]:
        """Return the versions near an outcome and the tenant's evaluations, on which its effect depends."""
        ranks = self.pool.snapshot.rankings.get(self.tenant, ())
        evaluations = [rank.ranking for rank in ranks if not rank.ranking.is_outcome]
        return frozenset([*(record.ref for record in self._near([ranking.vector]).values()), *evaluations])

    def embedding_effect(self, changed: AdapterRecord) -> Effect:
        """Return the effect of another embedding of an adapter."""
        near = self._near([] if changed.embedding is None else [changed.embedding.vector])
        before = self._before(near, near)
        return self._effect(before, self._small({**near, changed.ref.key: changed}, self._ranks()))

    def outcomes_effect(self, outcomes: Sequence[Ranking], changed: Sequence[Ranking]) -> Effect:
        """Return the effect of these outcomes of the tenant, on the samples near those that are new or withdrawn."""
        near = self._near([ranking.vector for ranking in changed])
        named = (self.pool.snapshot.live(item.ref) for ranking in outcomes for item in ranking.adapters)
        compared = {record.ref.key: record for record in named if record is not None} | near
        before = self._before(near, compared)
        now, evaluations = datetime.now(UTC), [rank for rank in self._ranks() if not rank.ranking.is_outcome]
        wanted = [Rank(self.tenant, ranking, False, "", now) for ranking in outcomes]
        return self._effect(before, self._small(compared, (*evaluations, *wanted)))

    def _ranks(self) -> tuple[Rank, ...]:
        return self.pool.snapshot.rankings.get(self.tenant, ())

    def _effect(self, before: _Before, pool: Pool) -> Effect:
        """Return the difference between the answers before a change and those of `pool`."""
        found_after = self._num_found(pool, before.queries, before.owners)
        answered_after = self._answered(pool)
        effects = [
            Effect(
                len(before.owners),
                before.num_found,
                found_after,
                int(group.sum()),
                int(before.answered[group].sum()),
                int(answered_after[group].sum()),
            )
            for group in split_bare_words(len(answered_after)) or [np.zeros(0, np.bool_)]
        ]
        return max(effects, key=lambda effect: (effect.refusal is not None, effect.answered_share))

    def _before(self, near: Mapping[Key, AdapterRecord], compared: Mapping[Key, AdapterRecord]) -> _Before:
        """Return what finds the samples of the adapters `near` among all that are compared."""
        keys = frozenset(near), frozenset(compared)
        if keys not in self.last:
            queries, owners = self._queries(near)
            pool = self._small(compared, self._ranks())
            self.last.clear()
            self.last[keys] = _Before(queries, owners, self._num_found(pool, queries, owners), self._answered(pool))
        return self.last[keys]

    def _near(self, vectors: Sequence[Vectors]) -> dict[Key, AdapterRecord]:
        """Return the live adapters nearest to these vectors that the tenant may find."""
        found: dict[Key, AdapterRecord] = {}
        if vectors:
            for matches in self.pool.index.search(np.stack(vectors), _NUM_CHECKED, self.pool.allowed(self.tenant)):
                found |= {match.record.ref.key: match.record for match in matches}
        return found

    def _queries(self, records: Mapping[Key, AdapterRecord]) -> tuple[Vectors, list[Key]]:
        """Return the vectors of the publishers' samples, and the adapter of each."""
        for key in records.keys() - self.read.keys():
            own = without_accepted(read_samples(self.samples, records[key]) or ())[:_MAX_SAMPLES]
            self.read[key] = _encoded(self.pool, [sample.input for sample in own], SAMPLES_OWNER)
        none = np.empty((0, self.pool.encoder.dim), np.float32)
        owners = [key for key in records for _ in self.read[key]]
        return np.concatenate([none, *[self.read[key] for key in records]]), owners

    def _small(self, records: Mapping[Key, AdapterRecord], ranks: tuple[Rank, ...]) -> Pool:
        """Return a pool of these adapters only."""
        pool = self.pool
        snapshot = Snapshot(pool.snapshot.generation, dict(records), rankings={self.tenant: ranks} if ranks else {})
        settings = IndexSettings(requires_approval=pool.index.requires_approval)
        return Pool.of(snapshot, pool.encoder, settings, ordinary=pool.ordinary, bases=pool.bases, centre=pool.centre)

    def _num_found(self, pool: Pool, queries: Vectors, owners: Sequence[Key]) -> int:
        fitting = ([m.record.ref for m in matches if m.fits] for matches in self._judged(pool, queries))
        return sum(
            bool(refs) and (refs[0].tenant, refs[0].name) == own for refs, own in zip(fitting, owners, strict=True)
        )

    def _answered(self, pool: Pool) -> NDArray[np.bool_]:
        """Return which ordinary prompts (J,) an adapter answers, each compared with the other ordinary prompts."""
        if pool.ordinary is None or pool.references is None:
            return np.zeros(0, np.bool_)
        found = self._judged(pool, pool.ordinary, nearness_to_others(pool.references).tolist())
        return np.asarray([any(match.fits for match in matches) for matches in found], np.bool_)

    def _judged(self, pool: Pool, queries: Vectors, near: Sequence[float] | None = None) -> list[list[Match]]:
        if not len(queries):
            return []
        preferences, num = pool.preferences(self.tenant), _NUM_COMPARED
        views = queries[:, np.newaxis]  # each text is read as a whole
        wanted = [num + preferences.count_blamed(own) for own in views]
        rows = zip(views, pool.nearest(queries, max(wanted), self.tenant), wanted, strict=True)
        found = [preferences.applied(own, matches[:room], num, ()) for own, matches, room in rows]
        judged = pool.judged(found, self.abstain, queries, near)
        if self.min_score is None:
            return judged
        return [[match._replace(threshold=self.min_score) for match in matches] for matches in judged]
