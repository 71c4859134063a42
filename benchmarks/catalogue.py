"""Open a catalogue with a long history, and publish into a large one: `python -m benchmarks.catalogue`.

The history publishes new versions of the same few names again and again, a thousand per commit, into a local folder.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import typer

from benchmarks.engine_cases import Quick, console, shown, table_of
from benchmarks.results_file import write_results
from lora_store import AdapterRecord, AdapterRef, Catalogue, Embedding, Event, Location, Publish, Snapshot, TenantQuota
from lora_store.rules import publish_events

NUM_EVENTS, NUM_NAMES = 1_000_000, 1_000
NUM_LARGE = 100_000
_BATCH = 1_000  # events per commit
_DIM, _NUM_SAMPLES = 384, 20
_SHARE = TenantQuota(max_adapters=10**9, max_bytes=10**15)  # checked but never exceeded


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of several attempts. `num_live`: live names; `num_events`: rows in the table before."""

    what: str
    num_live: int
    num_events: int
    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


class Records:
    """Creates records of realistic size by number. Their vectors are drawn once."""

    def __init__(self) -> None:
        rows = np.random.default_rng(0).standard_normal((_BATCH, _DIM)).astype(np.float32)
        scores = np.full(_NUM_SAMPLES, 0.5, np.float32)
        self._embeddings = [Embedding("encoder", row / np.linalg.norm(row), scores) for row in rows]

    def __call__(self, name: int, version: int) -> AdapterRecord:
        digest = f"{name:032x}{version:032x}"
        return AdapterRecord(
            ref=AdapterRef("local", f"adapter-{name}", digest),
            weights_digest=digest,
            samples_digest=digest[::-1],
            visibility="private",
            tags=("task", "benchmark"),
            base_model="gemma-3-270m",
            ranks=(8,),
            target_modules=("q_proj", "v_proj"),
            num_bytes=1 << 20,
            num_samples=_NUM_SAMPLES,
            template="chat",
            embedding=self._embeddings[(name + version) % _BATCH],
            probe_shift=0.5,
            source=f"adapter-{name}",
            actor="benchmark",
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
            generation=0,
        )


def filled(location: Location, num_names: int, num_events: int) -> Catalogue:
    """Publish the names in turn until the catalogue has this many events."""
    catalogue, records = Catalogue(location), Records()
    for start in range(0, num_events, _BATCH):
        numbers = range(start, min(start + _BATCH, num_events))
        events = [Publish(records(number % num_names, number // num_names)) for number in numbers]
        catalogue.commit(lambda snapshot, events=events: events)  # type: ignore[misc]
        if start % (100 * _BATCH) == 0:
            console.print(f"{start + len(events):,} of {num_events:,} events are committed")
    return catalogue


def opening(location: Location, num_tries: int, num_events: int) -> Measured:
    """Open the catalogue again each time, as a starting replica does."""
    seconds = []
    for _ in range(num_tries):
        began = time.perf_counter()
        num_live = len(Catalogue(location).snapshot().records)
        seconds.append(time.perf_counter() - began)
    return Measured("open", num_live, num_events, tuple(seconds))


def publishing(catalogue: Catalogue, num_tries: int, share: TenantQuota | None, first_version: int) -> Measured:
    """Publish a new version of one name at a time, and read the resulting state."""
    records, num_live, seconds = Records(), len(catalogue.snapshot().records), []
    for number in range(num_tries):
        record = records(number, first_version + number)

        def rule(snapshot: Snapshot, record: AdapterRecord = record) -> Sequence[Event]:
            return publish_events(snapshot, [record], quota=share)

        began = time.perf_counter()
        generation = catalogue.commit(rule)
        assert catalogue.snapshot().generation >= generation  # higher if the commit was followed by a fold
        seconds.append(time.perf_counter() - began)
    what = "publish, read" if share is None else "publish within a quota, read"
    return Measured(what, num_live, num_live, tuple(seconds))


def measure(num_events: int, num_names: int, num_large: int, num_tries: int) -> list[Measured]:
    """Open after `num_events` events, then publish into a pool of `num_large` names, with and without a quota."""
    with tempfile.TemporaryDirectory() as folder:
        location = Location(str(Path(folder, "history")))
        filled(location, num_names, num_events)
        found = [opening(location, max(3, num_tries // 10), num_events)]
    with tempfile.TemporaryDirectory() as folder:
        location = Location(str(Path(folder, "large")))
        catalogue = filled(location, num_large, num_large)
        for share, first_version in ((None, 10**6), (_SHARE, 2 * 10**6)):
            publishing(catalogue, 2, share, first_version - 1000)  # counts once
            found.append(publishing(catalogue, num_tries, share, first_version))
        found.append(opening(location, max(3, num_tries // 10), num_large))
    return found


def report(found: Sequence[Measured]) -> str:
    table = table_of("what", "live names", "events", "p50 ms", "max ms")
    for row in found:
        table.add_row(
            row.what,
            f"{row.num_live:,}",
            f"{row.num_events:,}",
            f"{1000 * row.median_s:.1f}",
            f"{1000 * max(row.seconds):.1f}",
        )
    return shown(table)


def main(quick: Quick = False) -> None:
    """Open after a million events with a thousand live names; publish at a hundred thousand live names."""
    found = measure(20_000, 100, 2_000, 10) if quick else measure(NUM_EVENTS, NUM_NAMES, NUM_LARGE, 50)
    table = report(found)
    if quick:
        return
    opened, publish, shared, large = found
    figures = {
        "open_after_1e6_events_s": opened.median_s,
        "publish_at_1e5_names_ms": 1000 * publish.median_s,
        "publish_at_1e5_names_with_share_ms": 1000 * shared.median_s,
        "open_1e5_names_s": large.median_s,
    }
    runs = [
        {"what": row.what, "live": row.num_live, "events": row.num_events, "seconds": list(row.seconds)}
        for row in found
    ]
    write_results("catalogue", figures=figures, table=table, runs=runs)


if __name__ == "__main__":
    typer.run(main)
