"""The results of publishing, rolling back and withdrawing adapters."""

from __future__ import annotations

from dataclasses import dataclass

from lora_store import AdapterRef
from retriever_svc import Candidate


@dataclass(frozen=True, slots=True)
class Published:
    """One adapter that is live. `ready` Retriever replicas route to it already, `behind` ones do not yet."""

    ref: AdapterRef
    generation: int
    ready: int
    behind: int
    found_by_auto: bool  # False: it came without samples, and only its name reaches it
    probe_shift: float | None
    neighbours: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Removed:
    """Adapters that are gone. `behind` Retriever replicas may still route to them."""

    names: tuple[str, ...]
    generation: int
    ready: int
    behind: int


@dataclass(frozen=True, slots=True)
class Settled:
    """A change that is committed. `behind` Retriever replicas do not know it yet."""

    generation: int
    ready: int
    behind: int
