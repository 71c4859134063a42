"""A Retriever replica's figures: what it serves, how long it takes, and how well prompts find adapters."""

from __future__ import annotations

from collections.abc import Callable

from deployments.observability.adapter_usage import RecentChoices, RoutingTotals
from deployments.observability.metrics import OTHER, SERVE, SHORT_SECONDS, MetricFactory
from lora_store import AdapterRef, Snapshot
from retriever_svc import NoAdapterMatched, Route
from retriever_svc.retriever import RouteAnswer

MAX_NAMED = 20  # adapters that a replica names; the others are one number
_DIGEST_CHARS = 12
_COSINES = (0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)


class RetrieverMetrics:
    """A public adapter goes by its name, any other by its version digest. Called on the event loop, but for times."""

    def __init__(self, kinds: MetricFactory = SERVE, recent: RecentChoices | None = None) -> None:
        self._recent, self._so_far = recent or RecentChoices(), RoutingTotals()
        self._generation_told = -1
        self._generation = kinds.Gauge("loraretriever_catalogue_generation", "The generation that is served")
        self._adapters = kinds.Gauge("loraretriever_catalogue_adapters", "Live adapters at that generation")
        self._age_s = kinds.Gauge(
            "loraretriever_catalogue_read_age_seconds", "Since the catalogue was last read without an error"
        )
        self._encode_s = kinds.Histogram(
            "loraretriever_encode_seconds", "The encoder, of one batch of prompts", SHORT_SECONDS
        )
        self._search_s = kinds.Histogram(
            "loraretriever_search_seconds", "The search, for the prompts of one request", SHORT_SECONDS
        )
        self._routes = kinds.Counter(
            "loraretriever_routes_total", "Prompts: chosen for, abstained (base model), refused (422)", ("outcome",)
        )
        self._best = kinds.Histogram("loraretriever_best_score_cosine", "A prompt's best candidate", _COSINES)
        self._choices = kinds.Gauge(
            "loraretriever_recent_choices", "Plans an adapter was in, of the last half hour to an hour", ("adapter",)
        )
        self._never = kinds.Gauge("loraretriever_never_chosen_adapters", "In no plan since this replica started")
        self._shadowed = kinds.Gauge(
            "loraretriever_always_shadowed_adapters", "Candidates of 20 prompts or more, and the best of none"
        )

    def encoded(self, seconds: float) -> None:
        """One batch of prompts was in the encoder for so long. Called on any thread."""
        self._encode_s.observe(seconds)

    def searched(self, seconds: float) -> None:
        """The search for the prompts of one request took so long. Called on any thread."""
        self._search_s.observe(seconds)

    def answered(self, answer: RouteAnswer) -> None:
        """One prompt's answer."""
        if isinstance(answer, Route):
            chosen = [row.ref for row in answer.plan.adapters]
            self._routes.inc(1, {"outcome": "abstained" if answer.abstained else "chosen"})
            self._recent.add(chosen)
            self._so_far.saw([candidate.ref for candidate in answer.candidates], chosen)
            best = answer.candidates[0].score if answer.candidates else None
        elif isinstance(answer, NoAdapterMatched):
            self._routes.inc(1, {"outcome": "refused"})
            best = answer.best_score
        else:
            return
        if best is not None:
            self._best.observe(best)

    def tell(self, snapshot: Snapshot, num_routable: int, read_age_s: float) -> None:
        """Tell every gauge. `num_routable`: how many adapters prompts may be routed to."""
        if snapshot.generation != self._generation_told:
            self._so_far.keep(_is_live_in(snapshot))
            self._generation_told = snapshot.generation
        self._generation.set(snapshot.generation)
        self._adapters.set(len(snapshot.records))
        self._age_s.set(read_age_s)
        self._never.set(max(num_routable - self._so_far.num_chosen, 0))
        self._shadowed.set(self._so_far.num_shadowed)
        most, others = self._recent.largest(MAX_NAMED)
        for ref, count in most:
            self._choices.set(count, {"adapter": _label_of(ref, snapshot)})
        self._choices.set(others, {"adapter": OTHER})


def _is_live_in(snapshot: Snapshot) -> Callable[[AdapterRef], bool]:
    def is_live(ref: AdapterRef) -> bool:
        record = snapshot.records.get((ref.tenant, ref.name))
        return record is not None and record.ref == ref

    return is_live


def _label_of(ref: AdapterRef, snapshot: Snapshot) -> str:
    """What anybody may know of it now: it may have gone private since it was chosen."""
    record = snapshot.records.get((ref.tenant, ref.name))
    is_public = record is not None and record.ref == ref and record.visibility == "public"
    return ref.name if is_public else ref.digest[:_DIGEST_CHARS]
