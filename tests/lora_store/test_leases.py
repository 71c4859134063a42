"""A publish and a sweep in every relevant order: the rival is called between the steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import pytest

from lora_store import Location, StoreUnavailable
from lora_store.blobs import BlobStore
from lora_store.files import Files
from lora_store.leases import INTENT_S, LEASE_S, SWEEP_S, Leases
from lora_store.weights_blob import hash_blob
from tests.lora_store.builders import FakeClock, Stored

DATA = b"weights"
DIGEST = hash_blob(DATA)
WAIT_S = 120.0


class Pool:
    """Blobs, leases, and a set instead of the catalogue."""

    def __init__(
        self,
        location: Location,
        clock: FakeClock,
        *,
        sleep: Callable[[float], object] | None = None,
        leases: type[Leases] = Leases,
    ) -> None:
        self.blobs = BlobStore(location.child("blobs"))
        self.leases = leases(location, clock.now, sleep or clock.sleep)
        self.holds, self.sweeps = (Files(location.child(folder)) for folder in ("holds", "sweeps"))
        self._clock = clock
        self.live: set[str] = set()

    def stamp(self) -> str:
        """Return the beginning of a file's name that another process would choose now."""
        return f"{int(self._clock.at.timestamp() * 1000)}.rival"

    def stage(self) -> str:
        lease = self.leases.acquire([DIGEST])
        self.blobs.put(DATA)
        return lease

    def commit(self, lease: str) -> None:
        self.live.add(DIGEST)
        self.leases.release([lease])

    def sweep(self, referenced: Callable[[], Collection[str]] | None = None) -> list[str]:
        return self.leases.sweep([DIGEST], referenced or self.live.copy, self.blobs.delete)


class RivalFirst(Leases):
    """Calls the rival after a sweep has written its intent and before it reads the leases."""

    rival: Callable[[], object]

    def leased(self) -> frozenset[str]:
        self.rival()
        return super().leased()


@pytest.fixture
def pool(location: Location, clock: FakeClock) -> Pool:
    return Pool(location, clock)


def test_blobs_that_are_live_or_in_any_of_two_leases_are_never_swept(pool: Pool) -> None:
    first, second = pool.stage(), pool.stage()
    pool.leases.release([first])
    assert pool.sweep() == []
    pool.commit(second)
    assert pool.sweep() == []
    assert pool.blobs.get(DIGEST) == DATA
    pool.live.clear()
    assert pool.sweep() == [DIGEST]


def test_a_lease_written_after_the_intent_and_before_the_check_is_seen(location: Location, clock: FakeClock) -> None:
    pool = Pool(location, clock, leases=RivalFirst)
    pool.blobs.put(DATA)
    pool.leases.rival = lambda: pool.holds.write(f"{pool.stamp()}.{DIGEST}", b"")
    assert pool.sweep() == []
    assert (len(pool.holds.entries()), pool.blobs.get(DIGEST)) == (1, DATA)


def test_a_commit_whose_lease_ends_just_before_the_check_is_seen(location: Location, clock: FakeClock) -> None:
    pool = Pool(location, clock, leases=RivalFirst)
    lease = pool.stage()
    pool.leases.rival = lambda: pool.commit(lease)
    assert pool.sweep(lambda: pool.live) == []
    assert pool.blobs.get(DIGEST) == DATA


def test_a_stage_after_the_check_waits_and_writes_its_blobs_again(location: Location, clock: FakeClock) -> None:
    waits, swept = threading.Event(), threading.Event()

    def sleep(_: float) -> None:
        waits.set()
        assert swept.wait(WAIT_S)

    rival, pool = Pool(location, clock, sleep=sleep), Pool(location, clock)
    pool.blobs.put(DATA)
    with ThreadPoolExecutor(1) as threads:
        staging = []

        def look() -> set[str]:
            staging.append(threads.submit(rival.stage))
            assert waits.wait(WAIT_S)  # its lease exists, its blobs are not checked yet
            return set()

        assert pool.sweep(look) == [DIGEST]
        swept.set()
        staging[0].result()
    assert pool.blobs.get(DIGEST) == DATA
    assert pool.sweep() == []


def test_a_stage_waits_only_for_sweeps_of_its_own_blobs(location: Location, clock: FakeClock) -> None:
    pool, before = Pool(location, clock), clock.at
    other = hash_blob(b"other")
    assert pool.leases.sweep([other], lambda: {pool.stage()}, pool.blobs.delete) == [other]
    assert clock.at == before


def test_a_stage_waits_until_the_intent_of_a_crashed_sweep_expires(location: Location, clock: FakeClock) -> None:
    pool = Pool(location, clock, sleep=lambda _: clock.sleep(5))
    pool.sweeps.write(pool.stamp(), DIGEST.encode())
    before = clock.at
    pool.stage()
    assert (clock.at - before).total_seconds() == INTENT_S


def test_a_sweep_that_is_late_or_fails_deletes_nothing(pool: Pool, clock: FakeClock, stored: Stored) -> None:
    pool.blobs.put(DATA)

    def look() -> set[str]:
        clock.sleep(SWEEP_S)
        return set()

    def fail() -> set[str]:
        raise RuntimeError("no catalogue")

    assert pool.sweep(look) == []
    assert (pool.blobs.get(DIGEST), stored("sweeps")) == (DATA, {})
    with pytest.raises(RuntimeError):
        pool.sweep(fail)
    assert (pool.blobs.get(DIGEST), stored("sweeps")) == (DATA, {})
    assert pool.sweep() == [DIGEST]


def test_a_stage_that_cannot_look_for_sweeps_leaves_no_lease(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(files: Files) -> NoReturn:
        raise StoreUnavailable("a timeout")

    with monkeypatch.context() as patched, pytest.raises(StoreUnavailable):
        patched.setattr(Files, "entries", fail)
        pool.stage()
    assert pool.holds.entries() == []


def test_a_lease_expires_and_is_unsafe_long_before(pool: Pool, clock: FakeClock) -> None:
    lease = pool.stage()
    assert pool.leases.is_safe(lease)
    clock.sleep(LEASE_S / 2)
    assert not pool.leases.is_safe(lease)
    assert pool.sweep() == []
    clock.sleep(LEASE_S / 2)
    assert pool.sweep() == [DIGEST]


def test_leases_and_intents_of_crashed_processes_are_deleted_once_they_expire(
    pool: Pool, clock: FakeClock, stored: Stored
) -> None:
    pool.stage()
    pool.sweeps.write(pool.stamp(), b"")
    pool.leases.delete_expired()
    assert (len(stored("holds")), len(stored("sweeps"))) == (1, 1)
    clock.sleep(INTENT_S)
    pool.leases.delete_expired()
    assert (len(stored("holds")), len(stored("sweeps"))) == (1, 0)
    clock.sleep(LEASE_S)
    pool.leases.delete_expired()
    assert (len(stored("holds")), len(stored("sweeps"))) == (0, 0)


def test_a_half_written_lease_in_a_folder_is_left_to_its_writer(folder_uri: str, clock: FakeClock) -> None:
    pool = Pool(Location(folder_uri), clock)
    half = f".{pool.stamp()}.{DIGEST}.0123"
    pool.holds.write(half, b"")
    pool.leases.delete_expired()
    assert pool.holds.contains(half)
    clock.sleep(LEASE_S)
    pool.leases.delete_expired()
    assert not pool.holds.contains(half)


def test_many_blobs_are_swept_in_rounds_that_each_check_again(pool: Pool, stored: Stored) -> None:
    digests = [hash_blob(b"%d" % number) for number in range(40)]
    looks = []
    gone: list[str] = []

    def look() -> Sequence[str]:
        looks.append(len(gone))
        return digests[:10]

    assert pool.leases.sweep(digests, look, gone.extend) == digests[10:] == gone
    assert looks == [0, 6, 22]
