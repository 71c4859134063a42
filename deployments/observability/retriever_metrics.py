"""Metrics of a Retriever replica: the catalogue it serves, its latencies, and the outcomes of routing."""

from __future__ import annotations

from collections.abc import Callable

from deployments.observability.adapter_usage import RecentPlans, RoutingTotals
from deployments.observability.metrics import OTHER, SERVE, SHORT_SECONDS, MetricFactory
from lora_store import AdapterRef, Snapshot
from retriever_svc import NoAdapterMatched, Route
from retriever_svc.retriever import RouteAnswer

MAX_NAMED = 20  # adapters with a label of their own; the others share one
_DIGEST_CHARS = 12
_COSINES = (0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)


class RetrieverMetrics:
    """Labels public adapters by name and all others by digest. All methods but the timings run on the event loop."""

    def __init__(self, factory: MetricFactory = SERVE, recent: RecentPlans | None = None) -> None:
        self._recent, self._totals = recent or RecentPlans(), RoutingTotals()
        self._reported_generation = -1
        self._generation = factory.Gauge("loraretriever_catalogue_generation", "Catalogue generation in service")
        self._adapters = factory.Gauge("loraretriever_catalogue_adapters", "Live adapters of the generation in service")
        self._age_s = factory.Gauge(
            "loraretriever_catalogue_read_age_seconds", "Time since the last successful read of the catalogue"
        )
        self._encode_s = factory.Histogram(
            "loraretriever_encode_seconds", "Time to encode one batch of prompts", SHORT_SECONDS
        )
        self._search_s = factory.Histogram(
            "loraretriever_search_seconds", "Time to search for the prompts of one request", SHORT_SECONDS
        )
        self._routes = factory.Counter(
            "loraretriever_routes_total",
            "Prompts by outcome: chosen, abstained (base model), refused (422)",
            ("outcome",),
        )
        self._best = factory.Histogram(
            "loraretriever_best_score_cosine", "Score of the best candidate of a prompt", _COSINES
        )
        self._plans = factory.Gauge(
            "loraretriever_recent_adapter_plans",
            "Plans with this adapter in the last 30 to 60 minutes",
            ("adapter",),
        )
        self._never = factory.Gauge(
            "loraretriever_never_chosen_adapters", "Adapters in no plan since this replica started"
        )
        self._shadowed = factory.Gauge(
            "loraretriever_shadowed_adapters", "Adapters that were candidates for 20 prompts or more and best for none"
        )

    def encoded(self, seconds: float) -> None:
        """Record the time to encode one batch. Safe on any thread."""
        self._encode_s.observe(seconds)

    def searched(self, seconds: float) -> None:
        """Record the time to search for one request. Safe on any thread."""
        self._search_s.observe(seconds)

    def record_route(self, answer: RouteAnswer) -> None:
        """Record the outcome of one prompt."""
        if isinstance(answer, Route):
            chosen = [row.ref for row in answer.plan.adapters]
            self._routes.inc(1, {"outcome": "abstained" if answer.abstained else "chosen"})
            self._recent.add(chosen)
            self._totals.add([candidate.ref for candidate in answer.candidates], chosen)
            best = answer.candidates[0].score if answer.candidates else None
        elif isinstance(answer, NoAdapterMatched):
            self._routes.inc(1, {"outcome": "refused"})
            best = answer.best_score
        else:
            return
        if best is not None:
            self._best.observe(best)

    def report(self, snapshot: Snapshot, num_routable: int, read_age_s: float) -> None:
        """Set every gauge. `num_routable`: how many adapters `auto` can choose."""
        if snapshot.generation != self._reported_generation:
            self._totals.retain(_is_live_in(snapshot))
            self._reported_generation = snapshot.generation
        self._generation.set(snapshot.generation)
        self._adapters.set(len(snapshot.records))
        self._age_s.set(read_age_s)
        self._never.set(max(num_routable - self._totals.num_chosen, 0))
        self._shadowed.set(self._totals.num_shadowed)
        most, others = self._recent.largest(MAX_NAMED)
        for ref, count in most:
            self._plans.set(count, {"adapter": _label_of(ref, snapshot)})
        self._plans.set(others, {"adapter": OTHER})


def _is_live_in(snapshot: Snapshot) -> Callable[[AdapterRef], bool]:
    def is_live(ref: AdapterRef) -> bool:
        record = snapshot.records.get((ref.tenant, ref.name))
        return record is not None and record.ref == ref

    return is_live


def _label_of(ref: AdapterRef, snapshot: Snapshot) -> str:
    """Return the adapter's public name, or a digest if it is private by now."""
    record = snapshot.records.get((ref.tenant, ref.name))
    is_public = record is not None and record.ref == ref and record.visibility == "public"
    return ref.name if is_public else ref.digest[:_DIGEST_CHARS]
