"""A plan and what it was chosen from."""

from __future__ import annotations

from dataclasses import dataclass

from lora_store import Plan
from retriever_svc import Candidate


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and what it was chosen from where the server chose."""

    plan: Plan
    candidates: tuple[Candidate, ...] = ()
    abstained: bool = False
