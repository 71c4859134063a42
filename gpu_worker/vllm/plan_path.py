"""Write a plan as a `lora_path`, the one string of a request that vLLM carries to its workers unchanged.

vLLM also puts the path into the keys of its prefix cache, so prompts share computed blocks only under equal plans.
"""

from __future__ import annotations

from lora_store.adapter import AdapterRef
from lora_store.plan import Plan, PlannedAdapter

SCHEME = "plan://"


def path_of(plan: Plan) -> str | None:
    """Return the path of the plan, or None if no adapter of it has a weight. Equal compositions have equal paths.

    A fusion must be replaced by its adapter before: see `fusions.with_fusion`.
    """
    assert plan.strategy != "fusion", "a path has the name of a fusion as an adapter"
    members = sorted((adapter.weights_digest, adapter.weight) for adapter in plan.adapters if adapter.weight != 0)
    if not members:
        return None
    return SCHEME + ",".join(f"{digest}={weight!r}" for digest, weight in members)


def is_plan_path(path: str) -> bool:
    return path.startswith(SCHEME)


def plan_of(path: str) -> Plan:
    """Return the plan of a path that `path_of` made. Names and scores of its adapters are not part of the path."""
    pairs = [member.split("=") for member in path.removeprefix(SCHEME).split(",")]
    adapters = tuple(PlannedAdapter(AdapterRef("-", "-", digest), digest, float(weight)) for digest, weight in pairs)
    return Plan("mixture", adapters)
