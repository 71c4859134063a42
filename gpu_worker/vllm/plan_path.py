"""Write a plan as a `lora_path`, the one string of a request that vLLM carries to its workers unchanged.

vLLM also puts the path into the keys of its prefix cache, so prompts share computed blocks only under equal plans.
"""

from __future__ import annotations

from lora_store.adapter import AdapterRef
from lora_store.lru_cache import LruCache
from lora_store.plan import Plan, PlannedAdapter

SCHEME = "plan://"
_MAX_KEPT = 65_536  # a multiple of the plans that can run at once: an id that is dropped has not run for long


def make_path(plan: Plan) -> str | None:
    """Return the path of the plan, or None if no adapter of it has a weight. Equal compositions have equal paths.

    A fusion must be replaced by its adapter before: see `fusions.with_fusion`.
    """
    assert not plan.averages_parameters, "a path has the name of a fusion as an adapter"
    members = sorted((adapter.weights_digest, adapter.weight) for adapter in plan.adapters if adapter.weight != 0)
    if not members:
        return None
    return SCHEME + ",".join(f"{digest}={weight!r}" for digest, weight in members)


def is_plan_path(path: str) -> bool:
    return path.startswith(SCHEME)


def parse_path(path: str) -> Plan:
    """Return the plan of a path that `make_path` made. Names and scores of its adapters are not part of the path."""
    pairs = [member.split("=") for member in path.removeprefix(SCHEME).split(",")]
    adapters = tuple(PlannedAdapter(AdapterRef("-", "-", digest), digest, float(weight)) for digest, weight in pairs)
    return Plan("mixture", adapters)


class PlanIds:
    """Ids by plan path, never used twice. To vLLM requests of equal paths are one, so a path has one id at a time."""

    def __init__(self, max_kept: int = _MAX_KEPT) -> None:
        self._ids: LruCache[str, int] = LruCache(max_kept)
        self._next = 1  # 0 is the base model

    def __call__(self, path: str) -> int:
        """Return the id of the path. The least recently used paths are forgotten."""
        known = self._ids.get(path)
        if known is not None:
            return known
        new, self._next = self._next, self._next + 1
        self._ids.put(path, new)
        return new
