"""An embedding and what lies near it."""

from __future__ import annotations

from dataclasses import dataclass

from lora_store.records import Embedding
from retriever_svc.route import Candidate


@dataclass(frozen=True, slots=True)
class Embedded:
    """An adapter's embedding, and the adapters it lies nearest to."""

    embedding: Embedding
    neighbours: tuple[Candidate, ...]
