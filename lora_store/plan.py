"""A Plan says which adapters answer one prompt, how much of each, and how they are composed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lora_store.adapter import AdapterRef
from lora_store.errors import PlanInvalid

Strategy = Literal["base", "selection", "mixture", "fusion"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
MAX_PLAN_ADAPTERS = 16
MAX_ABS_WEIGHT = 4.0


@dataclass(frozen=True, slots=True)
class PlannedAdapter:
    """One row of a plan. `weights_digest` keys bank entries and caches; `score` is None where a client chose."""

    ref: AdapterRef
    weights_digest: str
    weight: float
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Data that fully determines a composition: pinned versions, weights used as given, the generation it is of."""

    strategy: Strategy
    adapters: tuple[PlannedAdapter, ...] = ()
    generation: int = 0
    template: str | None = None  # the prompt template all its adapters name, None for the server's default

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise PlanInvalid(f"strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        count = len(self.adapters)
        if count > MAX_PLAN_ADAPTERS:
            raise PlanInvalid(f"a plan holds at most {MAX_PLAN_ADAPTERS} adapters, got {count}")
        if (self.strategy == "base") != (count == 0):
            raise PlanInvalid(f"strategy {self.strategy!r} does not go with {count} adapters")
        if self.strategy == "selection" and count != 1:
            raise PlanInvalid(f"selection takes exactly one adapter, got {count}")
        digests = [adapter.weights_digest for adapter in self.adapters]
        if len(set(digests)) != count:
            raise PlanInvalid("a plan names the same adapter twice")
        for adapter in self.adapters:
            if not math.isfinite(adapter.weight) or abs(adapter.weight) > MAX_ABS_WEIGHT:
                raise PlanInvalid(f"weight of {adapter.ref.name!r} must be finite and within ±{MAX_ABS_WEIGHT}")


BASE_PLAN = Plan(strategy="base")
