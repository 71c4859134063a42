"""Builders and types shared by the tests of the store."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from lora_store import (
    AdapterRecord,
    AdapterRef,
    Embedding,
    Label,
    LoraStore,
    ModuleWeights,
    Ranking,
    Snapshot,
    Staged,
    Visibility,
    check_folder,
)
from lora_store.events import ActivateEncoder, Approve, Embed, Event, Publish, SetVisibility, Withdraw
from lora_store.rankings import RankedAdapter
from lora_store.validation import CheckedFolder

MakeFolder = Callable[..., Path]
MakeRecord = Callable[..., AdapterRecord]
MakeWeights = Callable[..., dict[str, ModuleWeights]]
OpenStore = Callable[[], LoraStore]
PublishOne = Callable[..., Staged]
Stored = Callable[[str], dict[str, int]]

BASE = "tiny-base"
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
LATER = datetime.now(UTC) + timedelta(days=1)
IN_A_FOLDER = pytest.mark.parametrize("store_uri", ["folder"], indirect=True)  # for rules that hold over any storage
ON_S3 = pytest.mark.parametrize("store_uri", ["s3"], indirect=True)
SHAPES = {
    "model.layers.0.self_attn.q_proj": (8, 6),
    "model.layers.0.mlp.up_proj": (12, 6),
    "model.layers.1.self_attn.q_proj": (8, 6),
}


def read_folder(folder: Path) -> CheckedFolder:
    """Read an adapter of any base model."""
    return check_folder(folder, Label("any", base_model=BASE), accepts_base={BASE}, module_shapes=None)


def draw_events(draw: random.Random, snapshot: Snapshot, make_record: MakeRecord, number: int) -> list[Event]:
    """Draw one to four events on a few names of three tenants that the rules would allow."""
    events: list[Event] = []
    for _ in range(draw.randrange(1, 5)):
        tenant, name = draw.choice("abc"), f"n{draw.randrange(4)}"
        visibility: Visibility = "public" if tenant == "a" else "private"
        record = snapshot.records.get((tenant, name))
        kind = draw.randrange(9)
        if record is None or kind < 4:
            weights, digest = draw.randrange(5), f"{draw.randrange(number + 1):064x}"
            own = {"weights_digest": f"w{weights}", "num_bytes": 10 + weights, "visibility": visibility}
            samples = draw.choice([None, f"s{weights}"])
            events.append(Publish(make_record(name, tenant, digest, samples_digest=samples, num_samples=number, **own)))
        elif kind == 4:
            events.append(Withdraw(record.ref, "me", NOON))
        elif kind == 5:
            events.append(SetVisibility(record.ref, draw.choice(["private", visibility]), "me", NOON))
        elif kind == 6:
            events.append(Approve(record.ref, "me", NOON))
        elif kind == 7:
            events.append(Embed(record.ref, embedding(float(number), encoder=f"e{number % 2}")))
        else:
            events.append(ActivateEncoder("model", f"e{number % 2}", "me", NOON))
        snapshot = snapshot.after(events[-1:], snapshot.generation + 1)
    return events


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
