"""Prompts to Plans."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from lora_store.adapter import LOCAL_TENANT, Sample
from lora_store.plan import Plan, Strategy
from lora_store.records import AdapterRecord
from lora_store.snapshot import Snapshot
from retriever_svc.calibration import OwnScores, SampleSource
from retriever_svc.encoder import Encoder, Vectors, embed_samples
from retriever_svc.errors import NoAdapterMatched, StaleIndex
from retriever_svc.index import Match
from retriever_svc.planning import named_plan, resolve_version, routed_plan
from retriever_svc.pool import Pool, routable_index
from retriever_svc.route import Candidate, Route, RouteRequest


class Retriever:
    """Answers every read from one Pool, which `catch_up` replaces whole: no read waits for a refresh.

    `min_score` is the floor of requests that name none. Without it and with `sample_source`, the floor is measured on
    the samples of the adapters the caller sees (`calibrate_floor`): every refresh embeds the samples of new versions
    before it shows them. With neither there is no floor. `temperature` divides scores in the `softmax` weighting.
    """

    def __init__(
        self,
        encoder: Encoder,
        snapshots: Callable[[], Snapshot],
        *,
        min_score: float | None = None,
        temperature: float = 0.05,
        sample_source: SampleSource | None = None,
    ) -> None:
        self._encoder, self._snapshots = encoder, snapshots
        self._min_score, self._temperature = min_score, temperature
        self._own_scores = OwnScores(encoder, sample_source) if sample_source and min_score is None else None
        self._refresh_lock = threading.Lock()
        self._pool = self._build(snapshots())

    @property
    def snapshot(self) -> Snapshot:
        """The generation that is being served."""
        return self._pool.snapshot

    def catch_up(self, generation: int = 0) -> int:
        """Serve the catalogue's newest generation, at least `generation`, and return it. Reads go on meanwhile.

        Raises: StaleIndex: the catalogue has not got there; what is newest is served, and the caller may try again.
        """
        with self._refresh_lock:
            snapshot = self._snapshots()
            if snapshot.generation > self._pool.snapshot.generation:
                self._pool = self._build(snapshot)
            served = self._pool.snapshot.generation
        if served < generation:
            raise StaleIndex(generation, served)
        return served

    def _build(self, snapshot: Snapshot) -> Pool:
        index = routable_index(snapshot, self._encoder)
        return Pool(snapshot, index, self._own_scores.refresh(index.records) if self._own_scores else {})

    def route(self, requests: Sequence[RouteRequest]) -> list[Route | NoAdapterMatched]:
        """One answer per request, in order, from one encoder call and one generation; an error in its own place."""
        pool = self._pool
        vectors = self._encoder.encode([request.text for request in requests])
        rows_of: defaultdict[str, list[int]] = defaultdict(list)
        for row, request in enumerate(requests):
            rows_of[request.tenant].append(row)
        answers: dict[int, Route | NoAdapterMatched] = {}
        for tenant, rows in rows_of.items():
            top_k = max(requests[row].top_k for row in rows)
            for row, matches in zip(rows, pool.nearest(vectors[rows], top_k, tenant), strict=True):
                answers[row] = self._decide(requests[row], matches[: requests[row].top_k], pool)
        return [answers[row] for row in range(len(requests))]

    def _decide(self, request: RouteRequest, matches: list[Match], pool: Pool) -> Route | NoAdapterMatched:
        floor, generation = self._floor(request, pool), pool.snapshot.generation
        candidates = tuple(Candidate(match.record.ref, match.score) for match in matches)
        if matches and matches[0].score >= floor:
            plan = routed_plan(request, matches, generation, self._temperature)
            return Route(plan, candidates, generation, abstained=False)
        if request.fallback == "error":
            return NoAdapterMatched(matches[0].score if matches else None, floor)
        return Route(Plan("base", generation=generation), candidates, generation, abstained=True)

    def _floor(self, request: RouteRequest, pool: Pool) -> float:
        if request.min_score is not None:
            return request.min_score
        return pool.view(request.tenant).floor if self._min_score is None else self._min_score

    def resolve(self, tenant: str, name: str) -> AdapterRecord:
        """The live version `tenant` means by `name` or `owner/name`, which a `@digest` prefix of 8 or more must match.

        Raises: AdapterNotFound: nothing live, nothing this tenant may see, or another version by now.
        """
        return resolve_version(self.snapshot, tenant, name)

    def plan_named(self, tenant: str, choices: Sequence[tuple[str, float]], strategy: Strategy = "mixture") -> Plan:
        """The plan of the adapters a client chose, (name, weight) each, weights as given. No encoder call.

        Raises: AdapterNotFound: as `resolve`. PlanInvalid: no plan can hold these.
        """
        return named_plan(self.snapshot, tenant, choices, strategy)

    def embed(self, samples: Sequence[Sample]) -> Vectors:
        """The embedding (D,) an adapter with these samples gets.

        Raises: NothingToEmbed: there is no sample.
        """
        return embed_samples(self._encoder, samples)

    def neighbours(self, vector: Vectors, num_wanted: int, tenant: str = LOCAL_TENANT) -> tuple[Candidate, ...]:
        """The adapters `tenant` sees that lie nearest to a unit vector (D,), best first."""
        pool = self._pool
        [matches] = pool.index.search(vector[np.newaxis], num_wanted, pool.view(tenant).allowed)
        return tuple(Candidate(match.record.ref, match.score) for match in matches)
