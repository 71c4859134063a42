"""A plan of two candidates, and its form in answers."""

from __future__ import annotations

from lora_store import Plan, PlannedAdapter
from retriever_svc import Candidate
from tests.deployments.adapter_records import POOL

POET, CODER = POOL
PLAN = Plan("selection", (PlannedAdapter(POET.ref, POET.weights_digest, 1.0, 0.75),), generation=7)
CANDIDATES = (Candidate(POET.ref, 0.75), Candidate(CODER.ref, 0.5))
LORA = {
    "strategy": "selection",
    "adapters": [{"name": "poet", "digest": POET.ref.digest, "weight": 1.0, "score": 0.75}],
    "abstained": False,
}
EXPLAINED = LORA | {
    "generation": 7,
    "candidates": [
        {"name": "poet", "digest": POET.ref.digest, "score": 0.75, "threshold": -1.0, "confidence": 1.0},
        {"name": "coder", "digest": CODER.ref.digest, "score": 0.5, "threshold": -1.0, "confidence": 1.0},
    ],
}
