"""The Retriever: turn prompts into Plans, and answer reads of the pool."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from lora_store.adapter import AdapterRef, Sample
from lora_store.bounded_files import Limits
from lora_store.errors import AdapterNotFound, AdapterRefused, PlanInvalid
from lora_store.feedback import Feedback
from lora_store.names import NamedPolicy
from lora_store.plan import Plan
from lora_store.rankings import Ranking
from lora_store.records import AdapterRecord, Embedding
from lora_store.strategies.registry import Strategy
from retriever_svc.asked_prompts import AskedPrompt, count_answers
from retriever_svc.bulk import BulkEncoding
from retriever_svc.calibration import NO_THRESHOLD, Abstain, least_threshold
from retriever_svc.competence import Region, find_regions
from retriever_svc.doctor import DoctorStep, examine
from retriever_svc.draws import DrawMeasurement, Draws
from retriever_svc.embedding import embed_groups, make_encoding
from retriever_svc.encoder import Vectors
from retriever_svc.errors import AdapterIncompatible, NoAdapterMatched, StaleIndex
from retriever_svc.index import Match
from retriever_svc.learning import Learnt, Refused, Resampled, accept, learn
from retriever_svc.listing import Page, PageRequest
from retriever_svc.live_pool import LivePool
from retriever_svc.planning import (
    led_by,
    named_plan,
    named_policies,
    replayed_plan,
    resolve,
    resolve_version,
    routed_plan,
    visible_names,
    with_base,
    with_trials,
)
from retriever_svc.pool import Pool
from retriever_svc.projection import Place, Point, PoolMap
from retriever_svc.reindex import ReindexStep, reindex
from retriever_svc.route import Candidate, PinnedAdapter, Reason, Route, RouteRequest
from retriever_svc.sample_source import SampleSource
from retriever_svc.served_bases import BaseCounts
from retriever_svc.views import choose_views, read_ends, with_views

RouteAnswer = Route | NoAdapterMatched | StaleIndex
# Searched for each adapter after the best: of ten, two or more are of a base model with a fifth of the adapters, in 95
# of 100 cases.
_SPARE_MATCHES = 10
_ASKED_TOGETHER = 16  # prompts that the doctor routes in one step


class Timings:
    """Receives the duration of each part of the work, on any thread. This one ignores them."""

    def encoded(self, seconds: float) -> None:
        pass

    def searched(self, seconds: float) -> None:
        pass


class PoolSize(NamedTuple):
    """The generation in service, how many adapters a tenant may use, and how many of all tenants are not served."""

    generation: int
    num_adapters: int
    unserved: BaseCounts = ()


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A text's vector (D,) and the pool whose encoder made it. The search uses that pool even if a newer one exists."""

    pool: Pool
    vector: Vectors


@dataclass(frozen=True, slots=True, eq=False)
class _RequestGroup:
    """Requests that share tenant, tags, base model, abstention and number of matches. Dims: N requests.

    `near` (N,): how near the texts are to ordinary prompts. `others` (N,): the vectors (D,) of the other views of the
    same prompts. `windows` (N,): what a search found among all base models, empty where one is asked for.
    """

    pool: Pool
    requests: list[RouteRequest]
    base_model: str
    vectors: Vectors  # (N, D)
    abstain: Abstain
    near: list[float] | None
    others: list[list[Vectors]]
    windows: list[list[Match]]

    @classmethod
    def of(
        cls,
        pool: Pool,
        requests: list[RouteRequest],
        rows: Sequence[Vectors],
        abstain: Abstain,
        others: list[list[Vectors]],
    ) -> _RequestGroup:
        """Search the windows where adapters of several base models may be found."""
        vectors, request, windows = np.stack(rows), requests[0], list[list[Match]]()
        if pool.bases.are_several and not request.base_model:
            num, allowed = request.num_considered, pool.allowed(request.tenant, request.tags)
            windows = pool.index.search(vectors, num, allowed, _SPARE_MATCHES * (num - 1))
        return cls(pool, requests, request.base_model, vectors, abstain, pool.nearness(vectors), others, windows)

    def select(self, places: list[int], base_model: str) -> _RequestGroup:
        """Return the requests at these places, for this base model."""
        return _RequestGroup(
            self.pool,
            [self.requests[place] for place in places],
            base_model,
            self.vectors[places],
            self.abstain,
            self.near and [self.near[place] for place in places],
            [self.others[place] for place in places],
            [self.windows[place] for place in places if self.windows],
        )


class Retriever:
    """Answers every read from the pool that is in service when the read begins.

    `abstain` is the operating point of requests without their own (see `calibration`). `min_score`, if given,
    replaces every adapter's threshold in requests that set neither `abstain` nor `min_score`. `temperature` divides the
    scores in the `softmax` weighting. `top_k`: the candidates that the doctor judges for a prompt. With `owner_names`,
    another tenant's public adapter can only be named as `owner/name`. Without `applies_outcomes`, outcomes that were
    applied before change no choice. Methods with a `min_generation` raise StaleIndex if this pool is older; then call
    `LivePool.catch_up` and retry.
    """

    def __init__(
        self,
        pools: LivePool,
        *,
        min_score: float | None = None,
        abstain: Abstain = "balanced",
        temperature: float = 0.05,
        top_k: int = 3,
        owner_names: bool = False,
        applies_outcomes: bool = True,
        timings: Timings | None = None,
    ) -> None:
        self._pools, self._min_score, self._abstain, self._temperature = pools, min_score, abstain, temperature
        self._top_k = top_k
        self._refused: dict[str, set[Refused]] = {}  # outcomes, by tenant
        self._owner_names, self._applies_outcomes = owner_names, applies_outcomes
        self._timings = timings or Timings()

    @property
    def generation(self) -> int:
        """The generation in service."""
        return self._pools.current.snapshot.generation

    def generation_for(self, tenant: str) -> int:
        """Return the newest generation in service that changed something `tenant` can see."""
        return self._pools.current.snapshot.generation_for(tenant)

    def route(self, requests: Sequence[RouteRequest]) -> list[RouteAnswer]:
        """Return one answer per request, in order, from one encoder call and one generation. Errors are returned.

        A long text is read in several views (see `views`).
        """
        pool = self._pools.current
        newest = {tenant: pool.snapshot.generation_for(tenant) for tenant in {request.tenant for request in requests}}
        fresh = [request for request in requests if request.min_generation <= newest[request.tenant]]
        views, places = with_views(fresh)
        encoded = _encode(pool, [(view.tenant, view.text) for view in views], self._timings)
        answers = self.route_encoded(views, encoded, places)
        routed = iter([answers[place] for place in choose_views(answers, places)])
        return [
            next(routed) if r.min_generation <= newest[r.tenant] else StaleIndex(r.min_generation, newest[r.tenant])
            for r in requests
        ]

    def encode(self, texts: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Encode (tenant, text) pairs with one call, for the pool in service."""
        return _encode(self._pools.current, texts, self._timings)

    def route_encoded(
        self, requests: Sequence[RouteRequest], encoded: Sequence[Encoded], places: Sequence[range]
    ) -> list[RouteAnswer]:
        """Return one answer per request, in order. `encoded` has one entry per request. Errors are returned.

        Each text is read as a whole: the caller passes the views of a long one as requests of their own. `places`: of
        the views of each prompt.
        """
        began = time.perf_counter()
        answers = self._answers(requests, encoded, _other_views(encoded, places))
        self._timings.searched(time.perf_counter() - began)
        return answers

    def _answers(
        self, requests: Sequence[RouteRequest], encoded: Sequence[Encoded], others: Sequence[list[Vectors]]
    ) -> list[RouteAnswer]:
        rows_of: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
        for row, (request, item) in enumerate(zip(requests, encoded, strict=True)):
            shared = request.tenant, request.tags, request.abstain, request.base_model, request.num_considered
            rows_of[id(item.pool), *shared].append(row)
        answers: dict[int, RouteAnswer] = {}
        for rows in rows_of.values():
            own, vectors = [requests[row] for row in rows], [encoded[row].vector for row in rows]
            pool, abstain = encoded[rows[0]].pool, own[0].abstain or self._abstain
            group = _RequestGroup.of(pool, own, vectors, abstain, [others[row] for row in rows])
            for row, request, matches in zip(rows, own, self._match(group), strict=True):
                answers[row] = self._decide(request, matches, encoded[row])
        return [answers[row] for row in range(len(requests))]

    def _match(self, group: _RequestGroup) -> list[list[Match]]:
        """Return the judged matches of each request.

        Where the base model is obvious, they are searched once, among its adapters. The others are searched among the
        adapters of all base models, and once more among those of one if matches of several are found.
        """
        found = self._match_obvious(group)
        rest = [place for place in range(len(group.requests)) if place not in found]
        found |= zip(rest, self._find_matches(group.select(rest, group.base_model)) if rest else (), strict=True)
        places_of = defaultdict[str, list[int]](list)
        for place in rest:
            if base_model := self._base_to_search_again(group.pool, group.requests[place], found[place]):
                places_of[base_model].append(place)
        for base_model, places in places_of.items():
            found |= zip(places, self._find_matches(group.select(places, base_model)), strict=True)
        return [found[place] for place in range(len(group.requests))]

    def _match_obvious(self, group: _RequestGroup) -> dict[int, list[Match]]:
        """Return the judged matches, by place, of requests whose best match fits and decides the base model.

        These are most of them, and are judged once: among the adapters of that base model. Where the best match scores
        too low, probably nothing fits, and the matches of every base model are shown.
        """
        pool, places_of = group.pool, defaultdict[str, list[int]](list)
        if not group.windows or not pool.preferences(group.requests[0].tenant).is_empty:
            return {}
        for place, (request, window) in enumerate(zip(group.requests, group.windows, strict=True)):
            least = self._least_score(request)
            if least is None and group.near is not None:
                least = least_threshold(group.abstain, group.near[place])
            if window and request.preferred is None and window[0].score >= (NO_THRESHOLD if least is None else least):
                places_of[pool.bases.name_in_plans(window[0].record.base_model)].append(place)
        found: dict[int, list[Match]] = {}
        for base_model, places in places_of.items():
            for place, matches in zip(places, self._judged(group.select(places, base_model)), strict=True):
                if self._fitting(group.requests[place], matches[:1]):
                    found[place] = matches
        return found

    def _find_matches(self, group: _RequestGroup) -> list[list[Match]]:
        """Return the judged matches of each request."""
        found, tenant = self._judged(group), group.requests[0].tenant
        crowded = [
            place
            for place, (request, matches) in enumerate(zip(group.requests, found, strict=True))
            if self._least_score(request) is None and _may_be_crowded(matches, tenant)
        ]
        if crowded:
            others = self._judged(group.select(crowded, group.base_model), trusted_only=True)
            found = _replace_crowded(found, dict(zip(crowded, others, strict=True)))
        return found

    def _judged(self, group: _RequestGroup, *, trusted_only: bool = False) -> list[list[Match]]:
        pool, request = group.pool, group.requests[0]
        preferences = pool.preferences(request.tenant)
        if not self._applies_outcomes:
            preferences = replace(preferences, outcomes=())
        num, tags, base_model = request.num_considered, request.tags, group.base_model
        windows = () if trusted_only else group.windows
        views = [np.stack([vector, *others]) for vector, others in zip(group.vectors, group.others, strict=True)]
        wanted = [num + preferences.count_blamed(own) for own in views]
        nearest = pool.nearest(
            group.vectors,
            max(wanted),
            request.tenant,
            tags,
            trusted_only=trusted_only,
            base_model=base_model,
            windows=windows,
        )
        rows = zip(views, nearest, wanted, strict=True)
        found = [preferences.applied(own, matches[:room], num, tags, base_model) for own, matches, room in rows]
        return pool.judged(found, group.abstain, group.vectors, group.near)

    def _base_to_search_again(self, pool: Pool, request: RouteRequest, matches: Sequence[Match]) -> str:
        """Return the base model of the best match that fits, if others of another base model are among the matches.

        A plan has one base model: it is made of the adapters of that one, as if the others did not exist.
        """
        if request.base_model or not pool.bases.are_several or len({m.record.base_model for m in matches}) < 2:
            return ""
        led = led_by(request.preferred, self._fitting(request, matches))
        found = [pool.bases.find(match.record.base_model) for match in [*led[:1], *matches]]
        return found[0] or "" if led and len(set(found)) > 1 else ""

    def _fitting(self, request: RouteRequest, matches: Sequence[Match]) -> list[Match]:
        return [match for match in self._with_thresholds(request, matches) if match.fits]

    def _with_thresholds(self, request: RouteRequest, matches: Sequence[Match]) -> list[Match]:
        least = self._least_score(request)
        return [match if least is None else match._replace(threshold=least) for match in matches]

    def _least_score(self, request: RouteRequest) -> float | None:
        """Return the score that takes the place of every threshold, if one does."""
        return self._min_score if request.min_score is None and request.abstain is None else request.min_score

    def _decide(self, request: RouteRequest, matches: list[Match], encoded: Encoded) -> Route | NoAdapterMatched:
        pool, matches = encoded.pool, self._with_thresholds(request, matches)
        generation = pool.snapshot.generation_for(request.tenant)
        candidates = tuple(_candidate(match) for match in matches)
        if fitting := [match for match in matches if match.fits]:
            planned = led_by(request.preferred, fitting)[: request.top_k]
            base_model = pool.bases.name_in_plans(planned[0].record.base_model)
            plan = routed_plan(request, planned, generation, self._temperature, base_model)
            live = {row.ref for row in plan.adapters}
            approval = pool.index.requires_approval
            plan = with_trials(plan, pool.snapshot, request.tenant, live, requires_approval=approval, bases=pool.bases)
            return Route(plan, candidates, generation, abstained=False, text=request.text)
        if request.fallback == "error":
            best = matches[0] if matches else None
            return NoAdapterMatched(best and best.score, NO_THRESHOLD if best is None else best.threshold)
        reason: Reason = "below_threshold" if matches else "no_candidates"
        back = pool.refers_back(encoded.vector)
        base_model = request.base_model or request.fallback_base or pool.bases.name_in_plans("")
        plan = Plan("base", generation=generation, base_model=base_model)
        return Route(plan, candidates, generation, True, reason, back, request.text)

    def plan_named(
        self,
        tenant: str,
        choices: Sequence[tuple[str, float]],
        strategy: Strategy = "mixture",
        min_generation: int = 0,
    ) -> Plan:
        """Return the plan of the (name, weight) pairs that a client chose. Make no encoder call.

        Raises: AdapterNotFound, as `resolve` does; AdapterIncompatible; PlanInvalid if these adapters cannot form a
        plan; StaleIndex.
        """
        pool = self._pool_at(min_generation, tenant)
        return named_plan(pool.snapshot, tenant, choices, strategy, owner_names=self._owner_names, bases=pool.bases)

    def replay(
        self,
        tenant: str,
        strategy: Strategy,
        pinned: Sequence[PinnedAdapter],
        generation: int,
        min_generation: int = 0,
    ) -> Plan:
        """Return the plan that was made at `generation`, with exactly the versions it pinned. Make no encoder call.

        Raises: PlanGone, AdapterIncompatible, PlanInvalid, StaleIndex.
        """
        pool = self._pool_at(min_generation, tenant)
        return replayed_plan(pool.snapshot, tenant, strategy, pinned, generation, bases=pool.bases)

    def policies(self, tenant: str, model: str, min_generation: int = 0, limit: int = 1) -> list[NamedPolicy]:
        """Return the newest kept policies of a model name, see `named_policies`. Raises: StaleIndex."""
        pool = self._pool_at(min_generation, tenant)
        found = named_policies(pool.snapshot, tenant, model, owner_names=self._owner_names)[:limit]
        return [with_base(pool.snapshot, tenant, named, pool.bases) for named in found]

    def find_model(
        self, tenant: str, model: str, strategy: Strategy, min_generation: int = 0
    ) -> NamedPolicy | Plan | None:
        """Return the newest policy of a model name, or else the plan of the adapter that is called so.

        None where there is neither, or no plan: `plan_named` says why. Raises: StaleIndex.
        """
        if found := self.policies(tenant, model, min_generation, 1):
            return found[0]
        with suppress(AdapterNotFound, AdapterIncompatible, PlanInvalid):
            return self.plan_named(tenant, [(model, 1.0)], strategy, min_generation)
        return None

    def names(
        self, tenant: str, after: str = "", limit: int | None = None, *, is_short: bool = False
    ) -> list[NamedPolicy]:
        """Return the newest policy of each name that `tenant` may use, see `visible_names`."""
        pool = self._pools.current
        found = visible_names(pool.snapshot, tenant, after, limit, is_short=is_short)
        return [with_base(pool.snapshot, tenant, named, pool.bases) for named in found]

    def resolve(self, tenant: str, name: str, min_generation: int = 0) -> AdapterRecord:
        """Return the version that `tenant` means by `name` or `owner/name`, optionally with `@digest`.

        Raises: AdapterNotFound, as `resolve_version` does; StaleIndex.
        """
        return resolve_version(
            self._pool_at(min_generation, tenant).snapshot, tenant, name, owner_names=self._owner_names
        )

    def page(self, tenant: str, request: PageRequest, min_generation: int = 0) -> Page:
        """Return a page of the adapters that `tenant` may use. Raises: StaleIndex."""
        pool = self._pool_at(min_generation, tenant)
        return replace(pool.listings.page(tenant, request), unserved=pool.unserved(tenant))

    def versions(self, tenant: str, name: str, min_generation: int = 0) -> tuple[int, list[AdapterRecord]]:
        """Return (generation, the kept versions that `tenant` may see of the adapter it names, the live one first).

        Raises: AdapterNotFound, StaleIndex.
        """
        snapshot = self._pool_at(min_generation, tenant).snapshot
        ref = resolve_version(snapshot, tenant, name, owner_names=self._owner_names).ref
        kept = snapshot.versions(ref.key)
        return snapshot.generation_for(tenant), [record for record in kept if record.is_visible_to(tenant)]

    def evaluation(self, tenant: str, name: str) -> Ranking | None:
        """Return what the tenant's last evaluation measured on the examples of this adapter; None: nothing.

        An evaluation of an earlier version does not count. Raises: AdapterNotFound.
        """
        snapshot = self._pool_at(0, tenant).snapshot
        ref = resolve_version(snapshot, tenant, name, owner_names=self._owner_names).ref
        rankings = [rank.ranking for rank in snapshot.rankings.get(tenant, ())]
        return next((ranking for ranking in rankings if ranking.anchor == ref), None)

    def _pool_at(self, min_generation: int, tenant: str) -> Pool:
        """Return the pool in service. Compare with what the tenant can see, to reveal nothing about other tenants.

        Raises: StaleIndex.
        """
        pool = self._pools.current
        found = pool.snapshot.generation_for(tenant)
        if found < min_generation:
            raise StaleIndex(min_generation, found)
        return pool

    def embed_groups(
        self, groups: Sequence[Sequence[Sample]], tenants: Sequence[str] | None = None
    ) -> list[Embedding | None]:
        """Return one embedding per group of samples; None and `tenants` as in `embed_groups`."""
        return embed_groups(self._pools.current.encoder, groups, tenants)

    def make_encoding(self, groups: Sequence[Sequence[Sample]], tenants: Sequence[str]) -> BulkEncoding:
        """Return a chunk-by-chunk encoding of the samples of all groups, by the encoder in service."""
        return make_encoding(self._pools.current.encoder, groups, tenants)

    def neighbours(self, embedding: Embedding, num_wanted: int, tenant: str) -> tuple[Candidate, ...]:
        """Return the nearest adapters that `auto` may choose for `tenant`, best first; none for another encoder."""
        pool = self._pools.current
        if embedding.encoder != pool.encoder.identity:
            return ()
        vectors: Vectors = embedding.vector[np.newaxis]
        [matches] = pool.index.search(vectors, num_wanted, pool.allowed(tenant))
        [matches] = pool.judged([matches], self._abstain, vectors)
        return tuple(_candidate(match) for match in matches)

    def draw_measurement(self, tenant: str, name: str, samples: SampleSource) -> DrawMeasurement:
        """Return a measurement of what the version that `tenant` names would draw.

        Raises: AdapterNotFound; AdapterRefused if it has samples that the encoder in service has not embedded: `auto`
        would find it only after the next reindex.
        """
        record, pool = self.resolve(tenant, name), self._pools.current
        if record.samples_digest is not None and record.encoder != pool.encoder.identity:
            reason = "the pool's encoder has not embedded its samples, so what it would answer cannot be measured"
            raise AdapterRefused(record.ref.name, [f"{reason}: run `loraretriever pool reindex` first"])
        return DrawMeasurement.of(pool, record, samples)

    def draws(self, measurement: DrawMeasurement) -> Draws:
        """Return what the version would draw, at the operating point of requests without their own."""
        return measurement.result(self._abstain, self._min_score)

    def map(self, tenant: str) -> PoolMap:
        """Return the map of the adapters to which `tenant` may be routed."""
        return self._pools.current.map(tenant)[1]

    def place(self, tenant: str, text: str, names: Sequence[str]) -> Place:
        """Encode a text and return its place, as `place_encoded` does."""
        [encoded] = self.encode([(tenant, text)])
        return self.place_encoded(tenant, encoded, names)

    def place_encoded(self, tenant: str, encoded: Encoded, names: Sequence[str]) -> Place:
        """Return the place of a text on the map of `tenant`, and of those of `names` that are visible and embedded.

        Ignore versions: `name@digest` has the place of the live `name`.
        """
        pool = encoded.pool
        layout, _ = pool.map(tenant)
        bare = [name.partition("@")[0] for name in names]
        records = [r for name in bare for r in pool.embedded(tenant, name, owner_names=self._owner_names)]
        vectors = [record.embedding.vector for record in records if record.embedding is not None]
        [(x, y), *others] = layout.place(np.stack([encoded.vector, *vectors]))[1].tolist()
        adapters = tuple(Point(record.ref, *at) for record, at in zip(records, others, strict=True))
        return Place(pool.snapshot.generation_for(tenant), Point(None, x, y), adapters)

    def count(self, tenant: str) -> PoolSize:
        """Return the size of the pool in service, as `tenant` sees it."""
        pool = self._pools.current
        return PoolSize(pool.snapshot.generation_for(tenant), pool.count(tenant), pool.unserved())

    def doctor(self, tenant: str, samples: SampleSource, prompts: Sequence[AskedPrompt] = ()) -> Iterator[DoctorStep]:
        """Examine how well the adapters of `tenant` are retrieved; the last step has the report (see `examine`).

        Route the prompts, too. Raises: AdapterNotFound for an unknown name in them.
        """
        pool = self._pools.current
        wanted = [self._named(pool, tenant, prompt) for prompt in prompts]
        routes: list[Route] = []
        for step in examine(pool, tenant, samples, self._top_k, self._pools.projections):
            total = step.num_total + len(prompts)
            if step.report is None:
                yield replace(step, num_total=total)
                continue
            for start in range(0, len(prompts), _ASKED_TOGETHER):
                texts = [read_ends(prompt.text) for prompt in prompts[start : start + _ASKED_TOGETHER]]
                views, places = with_views([RouteRequest(text, tenant, top_k=self._top_k) for text in texts])
                encoding = BulkEncoding(pool.encoder, [view.text for view in views], [tenant] * len(views))
                encoded = [Encoded(pool, vector) for vector in encoding.encode_all()]
                answers = self.route_encoded(views, encoded, places)
                chosen = (answers[place] for place in choose_views(answers, places))
                routes += [answer for answer in chosen if isinstance(answer, Route)]
                yield DoctorStep(step.num_done + len(routes), total)
            asked = count_answers(zip(wanted, routes, strict=True)) if prompts else None
            yield DoctorStep(total, total, replace(step.report, asked=asked))

    def _named(self, pool: Pool, tenant: str, prompt: AskedPrompt) -> tuple[AdapterRef, ...] | None:
        """Return the adapters that should answer the prompt, as in `AskedPrompt`. Raises: AdapterNotFound."""
        if prompt.adapters is None:
            return None
        owner_names, snapshot = self._owner_names, pool.snapshot
        return tuple(resolve(snapshot, tenant, name, owner_names=owner_names).ref for name in prompt.adapters)

    def regions(self, tenant: str, samples: SampleSource) -> Iterator[Region]:
        """Return the regions in which adapters of `tenant` can be measured (see `competence`)."""
        return find_regions(self._pools.current, tenant, samples)

    def accept(
        self, live: AdapterRecord, texts: Sequence[str], samples: SampleSource, limits: Limits | None = None
    ) -> Resampled:
        """Return the samples of the live version with these prompts, and their effect (see `learning`)."""
        return accept(self._pools.current, live, texts, samples, self._abstain, self._min_score, limits)

    def learn(self, tenant: str, outcomes: Sequence[Feedback], samples: SampleSource) -> Learnt:
        """Return the choices that these outcomes lead to for `tenant`, and their effect (see `learning`)."""
        refused = self._refused.setdefault(tenant, set())
        return learn(self._pools.current, tenant, outcomes, samples, self._abstain, self._min_score, refused)

    def reindex(self, model: str, samples: SampleSource, projection: str = "auto") -> Iterator[ReindexStep]:
        """Embed every adapter that has no embedding by the encoder of `model` with the projection yet.

        `projection`: auto, none, or the identity of a projection that `LivePool.refit` made.
        Raises: EncoderUnusable, ProjectionUnusable, StoreUnavailable.
        """
        return reindex(self._pools.current.snapshot, self._pools.prepare_encoder(model, projection), samples)


def _other_views(encoded: Sequence[Encoded], places: Sequence[range]) -> list[list[Vectors]]:
    """Return for each text the vectors of the other views of its prompt, by the same encoder."""
    found: list[list[Vectors]] = []
    for own in places:
        views = [encoded[place] for place in own]
        found += [[other.vector for other in views if other is not view and other.pool is view.pool] for view in views]
    return found


def _may_be_crowded(matches: Sequence[Match], tenant: str) -> bool:
    """Return whether none fits, and unapproved adapters of other tenants may hide one that does."""
    strangers = (match.record for match in matches if match.record.ref.tenant != tenant)
    return any(not record.approved for record in strangers) and not any(match.fits for match in matches)


def _replace_crowded(found: Sequence[list[Match]], others: dict[int, list[Match]]) -> list[list[Match]]:
    """Return the matches. Where `others` has a list with a match that fits, return that list instead."""
    pairs = ((matches, others.get(place, [])) for place, matches in enumerate(found))
    return [other if any(match.fits for match in other) else matches for matches, other in pairs]


def _candidate(match: Match) -> Candidate:
    return Candidate(match.record.ref, match.score, match.threshold, match.confidence, match.outcome)


def _encode(pool: Pool, texts: Sequence[tuple[str, str]], timings: Timings) -> list[Encoded]:
    began = time.perf_counter()
    vectors = pool.encoder.encode([text for _, text in texts], [tenant for tenant, _ in texts])
    timings.encoded(time.perf_counter() - began)
    return [Encoded(pool, vector) for vector in vectors]
