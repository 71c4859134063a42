"""The Retriever's requests and answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from lora_store.adapter import LOCAL_TENANT, AdapterRef
from lora_store.plan import Plan
from lora_store.records import Embedding
from lora_store.strategies.registry import ROUTED_STRATEGIES, RoutedStrategy
from lora_store.strategies.strategy import MAX_PLAN_ADAPTERS, OptionValues
from retriever_svc.calibration import NO_THRESHOLD, Abstain
from retriever_svc.errors import RouteInvalid
from retriever_svc.weightings import WEIGHTINGS, Weighting

Fallback = Literal["base", "error"]
# With it 96 % of the turns about the same task keep their adapter, and 1 % of those about another task wrongly do:
# `python -m benchmarks.routing.margins`.
STICKY_MARGIN = 0.1
STICKY_PLACES = 3  # best candidates among which the adapter of the previous turn is looked for, also for a smaller k
Reason = Literal["fits", "below_threshold", "no_candidates"]
Counted = Literal["always", "if_chosen", "never"]


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """One prompt, to be routed to adapters that have all of `tags`.

    `options`: values for options of the strategy; the others have their defaults.
    `abstain`: how much nearer than to ordinary prompts a prompt must be to an adapter (see `calibration`); None means
    the Retriever's own. `min_score`: a cosine that takes the place of every adapter's threshold, whatever `abstain` is.
    `preferred`: the adapter of the conversation's previous turn. If it fits, it stays the best one unless another
    scores higher by more than `STICKY_MARGIN`. A pool older than `min_generation` answers with StaleIndex.
    `shows_samples`: candidates of this tenant come with the samples that the text is nearest to. `counted`: whether
    metrics count this text as a prompt: `never` for that of an earlier turn, `if_chosen` if another text is tried next.
    `base_model`: the name of the served base model that answers; by default the best adapter's, and without one the
    first. `fallback_base`: the one that answers without an adapter, instead of the first.
    Raises: RouteInvalid if a value is out of range.
    """

    text: str
    tenant: str = LOCAL_TENANT
    strategy: RoutedStrategy = "mixture"
    top_k: int = 3
    weighting: Weighting = "evidence"
    min_score: float | None = None
    fallback: Fallback = "base"
    tags: tuple[str, ...] = ()
    min_generation: int = 0
    preferred: AdapterRef | None = None
    abstain: Abstain | None = None
    shows_samples: bool = False
    counted: Counted = "always"
    options: OptionValues = field(default_factory=dict)
    base_model: str = ""
    fallback_base: str = ""

    def __post_init__(self) -> None:
        _check_choice("strategy", self.strategy, ROUTED_STRATEGIES)
        _check_choice("weighting", self.weighting, tuple(WEIGHTINGS))
        _check_choice("fallback", self.fallback, get_args(Fallback))
        if self.abstain is not None:
            _check_choice("abstain", self.abstain, get_args(Abstain))
        if not 1 <= self.top_k <= MAX_PLAN_ADAPTERS:
            raise RouteInvalid(f"top_k must be from 1 to {MAX_PLAN_ADAPTERS}, got {self.top_k}")
        _check_choice("counted", self.counted, get_args(Counted))
        if self.min_score is not None and not math.isfinite(self.min_score):
            raise RouteInvalid(f"min_score must be a finite number, got {self.min_score}")

    @property
    def num_considered(self) -> int:
        """How many of the best adapters are judged: more than `top_k` if the preferred one may be among them."""
        return self.top_k if self.preferred is None else max(self.top_k, STICKY_PLACES)


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RouteInvalid(f"{field} must be one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True, slots=True)
class NearSample:
    """The input of an adapter's sample, perhaps shortened, with its cosine to the prompt."""

    text: str
    score: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter considered for a prompt, with its cosine to the prompt.

    It may answer if the score reaches the threshold. `confidence`: the probability that it is the right adapter, 0..1
    (see `calibration`). `outcome`: what the tenant's outcomes for nearly the same prompts say in sum; below 0 it may
    not answer. `samples`: the nearest samples, if the request asks for them and the adapter is the tenant's own.
    """

    ref: AdapterRef
    score: float
    threshold: float = NO_THRESHOLD
    confidence: float = 1.0
    outcome: float = 0.0
    samples: tuple[NearSample, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether it may answer."""
        return self.score >= self.threshold and self.outcome >= 0


@dataclass(frozen=True, slots=True)
class Embedded:
    """An adapter's embedding, and the adapters nearest to it."""

    embedding: Embedding
    neighbours: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Route:
    """The plan for one prompt, and its candidates, nearest first. `abstained`: the plan is the base model's.

    `reason`: `fits` if candidates reach their thresholds, `below_threshold` if none does, `no_candidates` if the caller
    may use none. Only candidates that reach their thresholds are in the plan. `refers_back`: no adapter fits, and the
    text is like prompts that mean the turn before them, such as "shorter, please". `text`: the part of a long prompt
    that decided, or the whole text.
    """

    plan: Plan
    candidates: tuple[Candidate, ...]
    generation: int
    abstained: bool
    reason: Reason = "fits"
    refers_back: bool = False
    text: str = ""


@dataclass(frozen=True, slots=True)
class PinnedAdapter:
    """One row of a plan that a client sends back: an adapter's name and full version digest, weight and score."""

    name: str
    digest: str
    weight: float
    score: float | None = None
