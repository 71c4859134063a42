"""An embedding and its nearest adapters."""

from __future__ import annotations

from dataclasses import dataclass

from lora_store.records import Embedding
from retriever_svc.route import Candidate


@dataclass(frozen=True, slots=True)
class Embedded:
    """An adapter's embedding, and the adapters nearest to it."""

    embedding: Embedding
    neighbours: tuple[Candidate, ...]
