"""Kill a publishing process with SIGKILL, at points spread over the publish."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from lora_store import AdapterRecord, Location, LoraStore, decode_weights
from lora_store.catalogue import Catalogue
from lora_store.event_table import EventTable
from lora_store.events import Publish
from lora_store.files import Files
from tests.lora_store.builders import BASE
from tests.lora_store.publishing import PROCESSES, fold_watched, publish, publish_watched
from tests.s3 import S3Endpoint
from tests.soak import Scale

_LATER = timedelta(hours=2)  # later than the leases of crashed processes expire
_LOG_FILE = re.compile(r"_delta_log/(\d{20}\.json|\d{20}\.checkpoint\.parquet|_last_checkpoint)")


@dataclass(frozen=True, slots=True)
class Point:
    """The point of death: a step (a file that it touches, a request that it sends), or a time after the start."""

    step: int | None = None
    after_s: float = 60.0


@dataclass(frozen=True)
class Victim:
    """Starts a process that publishes, and kills it."""

    uri: str
    endpoint: S3Endpoint | None
    work: Callable[..., None] = publish_watched

    def run(self, folder: Path, point: Point) -> tuple[int, float] | None:
        """Return (steps, seconds) of a completed publish; None if it was killed before its end."""
        ours, theirs = PROCESSES.Pipe()
        die_at = point.step if self.endpoint is None else None
        process = PROCESSES.Process(target=self.work, args=(self.uri, folder, "poet", theirs, die_at))
        process.start()
        theirs.close()
        assert ours.recv() == "ready"
        num_requests = self._count_requests(process, point.step)
        ours.send("go")
        began = time.monotonic()
        has_ended = ours.poll(point.after_s)
        took_s = time.monotonic() - began
        process.kill()
        process.join()
        num_touched = _received(ours) if has_ended else None
        if num_touched is None:
            return None
        return (num_touched if self.endpoint is None else num_requests()), took_s

    def _count_requests(self, process: BaseProcess, die_at: int | None) -> Callable[[], int]:
        """Return a function that counts requests so far; the process is killed at request number `die_at`."""
        numbers = itertools.count()

        def count() -> None:
            if next(numbers) == die_at:
                process.kill()

        def stop() -> int:
            self.endpoint.on_request = lambda: None
            return next(numbers)

        if self.endpoint is not None:
            self.endpoint.on_request = count
        return stop


def _received(channel: Connection) -> int | None:
    """Return the message of the process, None if it died before."""
    try:
        message: int = channel.recv()
        return message
    except EOFError:
        return None


@pytest.fixture
def victim(store_uri: str, request: pytest.FixtureRequest) -> Victim:
    on_s3 = store_uri.startswith("s3://")
    return Victim(store_uri, request.getfixturevalue("s3_endpoint") if on_s3 else None)


@pytest.fixture
def open_later(store_uri: str) -> Callable[[], LoraStore]:
    """Open the store as another process would, two hours later."""
    return lambda: LoraStore(store_uri, accepts_base=[BASE], now=lambda: datetime.now(UTC) + _LATER)


def test_a_killed_publish_leaves_the_pool_whole(
    victim: Victim, open_later: Callable[[], LoraStore], make_folder: Callable[..., Path], scale: Scale
) -> None:
    store = LoraStore(victim.uri, accepts_base=[BASE])
    for seed, name in enumerate(["other", "poet", "another"]):
        publish(store, make_folder(name, seed), name)
    _, whole = [victim.run(make_folder("poet", seed), Point()) for seed in (3, 4)]  # the first one is a warm-up
    assert whole is not None
    num_points = scale.pick("kills", small=4 if victim.endpoint is None else 2, full=200)
    num_killed = 0
    for number, point in enumerate(_points(num_points, *whole)):
        old_digest = store.snapshot().records["local", "poet"].ref.digest
        folder = make_folder("poet", 11 + number, inputs=(f"sample {number}",))
        num_killed += victim.run(folder, point) is None
        reopened = open_later()
        _check_whole(reopened, old_digest, folder)
        _check_retry(reopened, folder)
        _check_collected(victim.uri, reopened)
    assert num_killed >= num_points // 2


def test_a_killed_fold_leaves_the_pool_whole(
    victim: Victim, make_record: Callable[..., AdapterRecord], tmp_path: Path, scale: Scale
) -> None:
    location = Location(victim.uri)
    catalogue, idle = Catalogue(location), Catalogue(location)
    catalogue.commit(lambda _: [Publish(make_record(f"a{number}")) for number in range(6)])
    folding = replace(victim, work=fold_watched)
    _, whole = [folding.run(tmp_path, Point()) for _ in range(2)]  # the first one is a warm-up
    assert whole is not None
    num_points = scale.pick("kills", small=4, full=200)
    num_killed = 0
    for number, point in enumerate(_points(num_points, *whole)):
        before = catalogue.snapshot()
        num_killed += folding.run(tmp_path, point) is None
        found = Catalogue(location).snapshot()
        expected = [dict(before.records), dict(before.records) | {("local", "poet"): found.records["local", "poet"]}]
        assert dict(found.records) in expected
        assert catalogue.snapshot() == found  # also for a replica that follows
        if number % 3 == 2:
            catalogue.vacuum(datetime.now(UTC) + _LATER)
            assert idle.snapshot().records == catalogue.snapshot().records == Catalogue(location).snapshot().records
    assert num_killed >= num_points // 2


def _points(number: int, num_steps: int, took_s: float) -> Iterator[Point]:
    """Return points spread over the publish, half of them by steps, half by time."""
    by_clock = number // 2
    at_steps = number - by_clock
    yield from (Point(step=index * num_steps // at_steps) for index in range(at_steps))
    yield from (Point(after_s=took_s * (index + 0.5) / by_clock) for index in range(by_clock))


def _check_whole(store: LoraStore, old_digest: str, folder: Path) -> None:
    """Check that the store opens, every listed adapter is intact, and the name has its old or its new version."""
    snapshot = store.snapshot()
    assert sorted(name for _, name in snapshot.records) == ["another", "other", "poet"]
    assert {check.problem for check in store.verify()} == {None}
    for record in snapshot.records.values():
        assert decode_weights(record.weights_digest, store.load(record.weights_digest)).modules
        assert len(store.samples(record.samples_digest or "")) == record.num_samples
    new = store.stage(folder, name="poet")
    assert snapshot.records["local", "poet"].ref.digest in (old_digest, new.ref.digest)
    store.discard([new])


def _check_retry(store: LoraStore, folder: Path) -> None:
    done = publish(store, folder, "poet")
    assert store.snapshot().records["local", "poet"].ref.digest == done.digest


def _check_collected(uri: str, store: LoraStore) -> None:
    """Check that after a gc only needed files are stored."""
    store.gc(0)
    location, snapshot = Location(uri), store.snapshot()
    stored = {
        part: {file.name for file in Files(location.child(part)).entries()} for part in ("blobs", "holds", "sweeps")
    }
    assert stored == {
        "blobs": {f"{digest[:2]}/{digest}" for digest in snapshot.referenced()},
        "holds": set(),
        "sweeps": set(),
    }
    table = {file.name for file in Files(location.child("catalogue")).entries()}
    live = EventTable(location.child("catalogue"))._data_files()
    assert {name for name in table if not _LOG_FILE.fullmatch(name)} == live
    assert {check.problem for check in store.verify()} == {None}
