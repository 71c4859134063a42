"""The Plan for one prompt: which adapters answer it, their weights, and how they are composed."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from lora_store.adapter import AdapterRef
from lora_store.errors import PlanInvalid
from lora_store.strategies.registry import STRATEGIES, Strategy
from lora_store.strategies.strategy import MAX_PLAN_ADAPTERS
from lora_store.trials import TrialVersion

MAX_ABS_WEIGHT = 4.0


@dataclass(frozen=True, slots=True)
class PlannedAdapter:
    """One adapter of a plan. Banks and caches use `weights_digest` as key. `score` is None if a client chose."""

    ref: AdapterRef
    weights_digest: str
    weight: float
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A composition, fully determined: pinned versions, their weights (used as given), and the pool's generation."""

    strategy: Strategy
    adapters: tuple[PlannedAdapter, ...] = ()
    generation: int = 0
    template: str | None = None  # the prompt template that all its adapters name, None for the server's default
    contract: str | None = None  # JSON, of the adapter that leads it
    trials: tuple[TrialVersion, ...] = ()  # versions that may answer in place of some; resolved before a plan runs
    base_model: str = ""  # the name of the one that answers, of several served base models

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise PlanInvalid(f"strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        count = len(self.adapters)
        if count > MAX_PLAN_ADAPTERS:
            raise PlanInvalid(f"a plan may have at most {MAX_PLAN_ADAPTERS} adapters, got {count}")
        most = STRATEGIES[self.strategy].most_adapters
        if most and not count:
            raise PlanInvalid(f"strategy {self.strategy!r} needs at least one adapter, got none")
        if count > most:
            allowed = {0: "no adapters", 1: "exactly one adapter"}.get(most, f"at most {most} adapters")
            raise PlanInvalid(f"strategy {self.strategy!r} takes {allowed}, got {count}")
        digests = [adapter.weights_digest for adapter in self.adapters]
        if len(set(digests)) != count:
            raise PlanInvalid("a plan must not contain the same adapter weights twice")
        for adapter in self.adapters:
            if not math.isfinite(adapter.weight) or abs(adapter.weight) > MAX_ABS_WEIGHT:
                limits = f"must be finite and within ±{MAX_ABS_WEIGHT}, got {adapter.weight}"
                raise PlanInvalid(f"the weight of {adapter.ref.name!r} {limits}")

    @property
    def leader(self) -> PlannedAdapter | None:
        """The adapter that has more than half of the weight, None if there is none."""
        half = sum(abs(row.weight) for row in self.adapters) / 2
        return next((row for row in self.adapters if row.weight > half), None)

    @property
    def averages_parameters(self) -> bool:
        """Whether rows average the adapters' parameters; else they add the adapters' outputs."""
        return STRATEGIES[self.strategy].averages_parameters

    def with_versions(self, chosen: Collection[TrialVersion]) -> Plan:
        """Return the plan with these versions in place of the live ones, and no trials."""
        by_live = {version.live: version for version in chosen}
        rows = [
            replace(row, ref=version.ref, weights_digest=version.weights_digest)
            if (version := by_live.get(row.ref)) is not None
            else row
            for row in self.adapters
        ]
        return replace(self, adapters=tuple(rows), trials=())


BASE_PLAN = Plan(strategy="base")
