"""The strategies and the weightings, from their registries."""

from __future__ import annotations

from docs.generate.markdown import code, table
from lora_store import ROUTED_STRATEGIES, STRATEGIES
from retriever_svc import WEIGHTINGS


def strategies() -> str:
    """Return what each strategy composes, and what it adds to a layer."""
    rows = [(code(name), STRATEGIES[name].summary, STRATEGIES[name].adds) for name in ROUTED_STRATEGIES]
    return table(("strategy", "composes", "the layer adds"), rows)


def weightings() -> str:
    """Return the weights that each weighting gives."""
    rows = [(code(each.name), each.summary) for each in WEIGHTINGS.values()]
    return table(("weighting", "weights of adapters with scores s, best first"), rows)
