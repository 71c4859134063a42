"""Metrics of a Retriever replica: the catalogue it serves, latencies, outcomes of routing, and adapters in use."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from deployments.observability.metrics import OTHER, SERVE, SHORT_SECONDS, MetricFactory
from lora_store import AdapterRef, Snapshot
from retriever_svc import NoAdapterMatched, Route
from retriever_svc.retriever import RouteAnswer, Timings
from retriever_svc.route import Counted

_WINDOW_S = 1800.0
_MIN_TIMES_SEEN = 20  # before an adapter that never came first counts as shadowed
MAX_NAMED = 20  # adapters with a label of their own; the others share one
_SHARES = (0.001, 0.005, 0.01, 0.03, 0.08, 0.15, 0.25, 0.5, 0.75, 0.9, 1.0)
_COSINES = (0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)


class RecentPlans:
    """Counts of how often each adapter was chosen in the current and the previous window: 30 to 60 minutes."""

    def __init__(self, window_s: float = _WINDOW_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._window_s, self._clock = window_s, clock
        self._began = clock()
        self._now: Counter[AdapterRef] = Counter()
        self._before: Counter[AdapterRef] = Counter()

    def add(self, refs: Sequence[AdapterRef]) -> None:
        """Count the adapters of one plan."""
        self._rotate()
        self._now.update(refs)

    def largest(self, num_wanted: int) -> tuple[list[tuple[AdapterRef, int]], int]:
        """Return the most frequent adapters with their counts, and the total count of all others."""
        self._rotate()
        both = self._now + self._before
        most = both.most_common(num_wanted)
        return most, both.total() - sum(count for _, count in most)

    def _rotate(self) -> None:
        passed = self._clock() - self._began
        if passed < self._window_s:
            return
        self._before = self._now if passed < 2 * self._window_s else Counter()
        self._now = Counter()
        self._began = self._clock()


class RoutingTotals:
    """Outcomes of all live adapters since this replica started."""

    def __init__(self) -> None:
        self._chosen: set[AdapterRef] = set()
        self._times_seen: Counter[AdapterRef] = Counter()
        self._came_first: set[AdapterRef] = set()

    def add(self, candidates: Sequence[AdapterRef], chosen: Collection[AdapterRef]) -> None:
        """Count one prompt: its candidates, best first, and the adapters of its plan."""
        self._chosen.update(chosen)
        self._times_seen.update(candidates)
        self._came_first.update(candidates[:1])

    def retain(self, is_live: Callable[[AdapterRef], bool]) -> None:
        """Forget all adapters that are not live."""
        self._chosen = set(filter(is_live, self._chosen))
        self._came_first = set(filter(is_live, self._came_first))
        self._times_seen = Counter({ref: times for ref, times in self._times_seen.items() if is_live(ref)})

    @property
    def num_chosen(self) -> int:
        """Adapters in at least one plan."""
        return len(self._chosen)

    @property
    def num_shadowed(self) -> int:
        """Adapters that were often candidates but never ranked first."""
        seen = self._times_seen.items()
        return sum(times >= _MIN_TIMES_SEEN and ref not in self._came_first for ref, times in seen)


class RetrieverMetrics(Timings):
    """Labels public adapters by name and all others by digest. All methods but the timings run on the event loop."""

    def __init__(self, factory: MetricFactory = SERVE, recent: RecentPlans | None = None) -> None:
        self._recent, self._totals = recent or RecentPlans(), RoutingTotals()
        self._reported_generation, self._reported_labels = -1, set[str]()
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
        self._confidence = factory.Histogram(
            "loraretriever_best_confidence_ratio",
            "Largest confidence of a prompt's candidates, 0 to 1: low if traffic fits no adapter",
            _SHARES,
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

    def record_route(self, answer: RouteAnswer, counted: Counted = "always") -> None:
        """Record the outcome of one prompt. `counted`: as in `RouteRequest`."""
        is_chosen = isinstance(answer, Route) and not answer.abstained
        if counted == "never" or (counted == "if_chosen" and not is_chosen):
            return
        if isinstance(answer, Route):
            chosen = [row.ref for row in answer.plan.adapters]
            self._routes.inc(1, {"outcome": "abstained" if answer.abstained else "chosen"})
            self._recent.add(chosen)
            self._totals.add([candidate.ref for candidate in answer.candidates], chosen)
            best = answer.candidates[0].score if answer.candidates else None
            if answer.candidates:
                self._confidence.observe(max(candidate.confidence for candidate in answer.candidates))
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
            self._totals.retain(lambda ref: snapshot.live(ref) is not None)
            self._reported_generation = snapshot.generation
        self._generation.set(snapshot.generation)
        self._adapters.set(len(snapshot.records))
        self._age_s.set(read_age_s)
        self._never.set(max(num_routable - self._totals.num_chosen, 0))
        self._shadowed.set(self._totals.num_shadowed)
        most, others = self._recent.largest(MAX_NAMED)
        counts = {_make_label(ref, snapshot): count for ref, count in most} | {OTHER: others}
        for label in counts.keys() | self._reported_labels:
            self._plans.set(counts.get(label, 0), {"adapter": label})
        self._reported_labels = set(counts)


def _make_label(ref: AdapterRef, snapshot: Snapshot) -> str:
    """Return the adapter's public name, or a digest if it is private by now."""
    record = snapshot.live(ref)
    return ref.name if record is not None and record.visibility == "public" else ref.short_digest
