"""Builders and types shared by the tests of the store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from lora_store import AdapterRecord, AdapterRef, Embedding, LoraStore, ModuleWeights, RankedAdapter, Ranking, Staged

MakeFolder = Callable[..., Path]
MakeRecord = Callable[..., AdapterRecord]
MakeWeights = Callable[..., dict[str, ModuleWeights]]
OpenStore = Callable[[], LoraStore]
PublishOne = Callable[..., Staged]
Stored = Callable[[str], dict[str, int]]

BASE = "tiny-base"
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
IN_A_FOLDER = pytest.mark.parametrize("store_uri", ["folder"], indirect=True)  # for rules that hold over any storage
SHAPES = {
    "model.layers.0.self_attn.q_proj": (8, 6),
    "model.layers.0.mlp.up_proj": (12, 6),
    "model.layers.1.self_attn.q_proj": (8, 6),
}


@dataclass
class FakeClock:
    """The clock of the stores of one test. Sleeping advances it."""

    at: datetime = field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))

    def now(self) -> datetime:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)


def embedding(*vector: float, encoder: str = "enc") -> Embedding:
    return Embedding(encoder, np.array(vector or (0.5, -0.25), np.float32), np.array([0.75, 0.5], np.float32))


def ranking(anchor: AdapterRef, *others: AdapterRef) -> Ranking:
    """A ranking in which the anchor beats the others."""
    adapters = [RankedAdapter(ref, 1.0 - place / 2, 8, place > 0) for place, ref in enumerate((anchor, *others))]
    own = embedding()
    return Ranking(anchor, tuple(adapters), own.encoder, own.vector, own.own_scores)
