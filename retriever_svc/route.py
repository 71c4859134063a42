"""The Retriever's requests and answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lora_store.adapter import LOCAL_TENANT, AdapterRef
from lora_store.plan import MAX_PLAN_ADAPTERS, Plan
from retriever_svc.errors import RouteInvalid

RoutedStrategy = Literal["selection", "mixture", "fusion"]
Weighting = Literal["evidence", "uniform", "softmax"]
Fallback = Literal["base", "error"]
STICKY_MARGIN = 0.1


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """One prompt, to be routed to adapters that have all of `tags`.

    `min_score`: None means the Retriever's own floor. `preferred`: the adapter of the conversation's previous turn. It
    stays the best one unless another scores higher by more than `STICKY_MARGIN`. A pool older than `min_generation`
    answers with StaleIndex.
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

    def __post_init__(self) -> None:
        _check_choice("strategy", self.strategy, get_args(RoutedStrategy))
        _check_choice("weighting", self.weighting, get_args(Weighting))
        _check_choice("fallback", self.fallback, get_args(Fallback))
        if not 1 <= self.top_k <= MAX_PLAN_ADAPTERS:
            raise RouteInvalid(f"top_k must be from 1 to {MAX_PLAN_ADAPTERS}, got {self.top_k}")
        if self.min_score is not None and not math.isfinite(self.min_score):
            raise RouteInvalid(f"min_score must be a finite number, got {self.min_score}")


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RouteInvalid(f"{field} must be one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter considered for a prompt, with its cosine to the prompt."""

    ref: AdapterRef
    score: float


@dataclass(frozen=True, slots=True)
class Route:
    """The plan for one prompt, and its candidates, best first. `abstained`: the plan is the base model's."""

    plan: Plan
    candidates: tuple[Candidate, ...]
    generation: int
    abstained: bool


@dataclass(frozen=True, slots=True)
class PinnedAdapter:
    """One row of a plan that a client sends back: an adapter's name and full version digest, weight and score."""

    name: str
    digest: str
    weight: float
    score: float | None = None
