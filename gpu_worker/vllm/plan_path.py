"""Write a plan as a `lora_path`, the one string of a request that vLLM carries to its workers unchanged.

vLLM also puts the path into the keys of its prefix cache, so prompts share computed blocks only under equal plans.
"""

from __future__ import annotations

from lora_store.adapter import AdapterRef
from lora_store.plan import Plan, PlannedAdapter

SCHEME = "plan://"


def path_of(plan: Plan) -> str | None:
    """Return the path of the plan, or None if no adapter of it has a weight. Equal compositions have equal paths."""
    members = sorted((adapter.weights_digest, adapter.weight) for adapter in plan.adapters if adapter.weight != 0)
    if not members:
        return None
    kind = "fusion" if plan.strategy == "fusion" else "mixture"
    return f"{SCHEME}{kind}?" + ",".join(f"{digest}={weight!r}" for digest, weight in members)


def is_plan_path(path: str) -> bool:
    return path.startswith(SCHEME)


def plan_of(path: str) -> Plan:
    """Return the plan of a path that `path_of` made. Names and scores of its adapters are not part of the path."""
    kind, _, members = path.removeprefix(SCHEME).partition("?")
    pairs = [member.split("=") for member in members.split(",")]
    adapters = tuple(PlannedAdapter(AdapterRef("-", "-", digest), digest, float(weight)) for digest, weight in pairs)
    return Plan("fusion" if kind == "fusion" else "mixture", adapters)
