"""The model names of the fakes, which a store changes and a retriever reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lora_store import AdapterRecord, Snapshot
from lora_store.events import Event
from tests.deployments.adapter_records import POOL


def _snapshot_of(records: Iterable[AdapterRecord]) -> Snapshot:
    return Snapshot(7, {(record.ref.tenant, record.ref.name): record for record in records})


@dataclass
class FakeNames:
    """Names beside the adapters of POOL, at generation 7."""

    snapshot: Snapshot = field(default_factory=lambda: _snapshot_of(POOL))

    def commit(self, events: Callable[[Snapshot], Sequence[Event]]) -> int:
        """Apply the events to the newest state, and return its generation."""
        self.snapshot = self.snapshot.after(events(self.snapshot), self.snapshot.generation + 1)
        return self.snapshot.generation
