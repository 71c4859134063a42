"""A publish and a sweep in every order that matters: the rival is called between the steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from lora_store import BlobStore, Location, digest_of
from lora_store.leases import HOLD_S, MARK_S, SWEEP_S, Leases

DATA = b"weights"
DIGEST = digest_of(DATA)
WAIT_S = 30.0


class Pool:
    """Blobs, holds, and a set in the place of the catalogue."""

    def __init__(self, location, clock, *, sleep: Callable[[float], object] | None = None, holds=Leases) -> None:
        self.blobs = BlobStore(location.child("blobs"))
        self.holds = holds(location, clock.now, sleep or clock.sleep)
        self.live: set[str] = set()

    def stage(self) -> str:
        hold = self.holds.take([DIGEST])
        self.blobs.put(DATA)
        return hold

    def commit(self, hold: str) -> None:
        self.live.add(DIGEST)
        self.holds.end([hold])

    def sweep(self, referenced: Callable[[], Collection[str]] | None = None) -> list[str]:
        return self.holds.sweep([DIGEST], referenced or self.live.copy, self.blobs.delete)


class RivalFirst(Leases):
    """Calls the rival between a sweep's mark and its look at the holds."""

    rival: Callable[[], object]

    def held(self) -> frozenset[str]:
        self.rival()
        return super().held()


@pytest.fixture
def pool(location, clock):
    return Pool(location, clock)


def test_what_nothing_holds_or_names_is_swept(pool, stored):
    pool.blobs.put(DATA)
    assert pool.sweep() == [DIGEST]
    assert DIGEST not in pool.blobs
    assert (stored("holds"), stored("sweeps")) == ({}, {})


def test_what_is_staged_or_live_is_never_swept(pool):
    hold = pool.stage()
    assert pool.sweep() == []
    pool.commit(hold)
    assert pool.sweep() == []
    assert pool.blobs.get(DIGEST) == DATA


def test_what_was_discarded_is_swept(pool):
    pool.holds.end([pool.stage()])
    assert pool.sweep() == [DIGEST]


def test_each_of_two_holds_is_enough(pool):
    first, second = pool.stage(), pool.stage()
    pool.holds.end([first])
    assert pool.sweep() == []
    pool.holds.end([second])
    assert pool.sweep() == [DIGEST]


def test_a_hold_taken_after_the_mark_and_before_the_look_is_seen(location, clock):
    pool = Pool(location, clock, holds=RivalFirst)
    rival = Pool(location, clock)
    held: list[str] = []

    def take() -> None:
        rival.holds._holds.write(f"{int(clock.at.timestamp() * 1000)}.rival.{DIGEST}", b"")
        held.append(DIGEST)

    pool.blobs.put(DATA)
    pool.holds.rival = take
    assert pool.sweep() == []
    assert (held, pool.blobs.get(DIGEST)) == ([DIGEST], DATA)


def test_a_commit_that_ends_its_hold_just_before_the_look_is_seen_in_the_catalogue(location, clock):
    pool = Pool(location, clock, holds=RivalFirst)
    hold = pool.stage()
    pool.holds.rival = lambda: pool.commit(hold)
    assert pool.sweep(lambda: pool.live) == []
    assert pool.blobs.get(DIGEST) == DATA


def test_a_stage_that_comes_after_the_look_waits_and_writes_its_blobs_again(location, clock):
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
            assert waits.wait(WAIT_S)  # its hold is there, its blobs are not looked for yet
            return set()

        assert pool.sweep(look) == [DIGEST]
        swept.set()
        staging[0].result()
    assert pool.blobs.get(DIGEST) == DATA
    assert pool.sweep() == []


def test_a_stage_waits_only_for_sweeps_of_its_own_blobs(location, clock):
    pool, before = Pool(location, clock), clock.at
    other = digest_of(b"other")
    assert pool.holds.sweep([other], lambda: {pool.stage()}, pool.blobs.delete) == [other]
    assert clock.at == before


def test_a_stage_outwaits_a_sweeper_that_died(location, clock):
    pool = Pool(location, clock, sleep=lambda _: clock.sleep(5))
    pool.holds._marks.write(pool.holds._stamp(), DIGEST.encode())
    before = clock.at
    pool.stage()
    assert (clock.at - before).total_seconds() == MARK_S


def test_a_sweep_that_took_too_long_deletes_nothing(pool, clock, stored):
    pool.blobs.put(DATA)

    def look() -> set[str]:
        clock.sleep(SWEEP_S)
        return set()

    assert pool.sweep(look) == []
    assert (pool.blobs.get(DIGEST), stored("sweeps")) == (DATA, {})
    assert pool.sweep() == [DIGEST]


def test_a_hold_dies_with_age_and_is_not_safe_long_before(pool, clock):
    hold = pool.stage()
    assert pool.holds.is_safe(hold)
    clock.sleep(HOLD_S / 2)
    assert not pool.holds.is_safe(hold)
    assert pool.sweep() == []
    clock.sleep(HOLD_S / 2)
    assert pool.sweep() == [DIGEST]


def test_what_crashes_left_is_dropped_once_it_is_dead(pool, clock, stored):
    pool.stage()
    pool.holds._marks.write(pool.holds._stamp(), b"")
    pool.holds.drop_dead()
    assert (len(stored("holds")), len(stored("sweeps"))) == (1, 1)
    clock.sleep(MARK_S)
    pool.holds.drop_dead()
    assert (len(stored("holds")), len(stored("sweeps"))) == (1, 0)
    clock.sleep(HOLD_S)
    pool.holds.drop_dead()
    assert (len(stored("holds")), len(stored("sweeps"))) == (0, 0)


def test_a_half_written_hold_of_a_folder_is_left_to_its_writer(folder_uri, clock):
    pool = Pool(Location(folder_uri), clock)
    half = f".{pool.holds._stamp()}.{DIGEST}.0123"
    pool.holds._holds.write(half, b"")
    pool.holds.drop_dead()
    assert pool.holds._holds.contains(half)
    clock.sleep(HOLD_S)
    pool.holds.drop_dead()
    assert not pool.holds._holds.contains(half)


def test_many_blobs_are_swept_in_rounds_that_each_look_again(pool, stored):
    digests = [digest_of(b"%d" % number) for number in range(40)]
    looks = []
    gone: list[str] = []

    def look() -> Sequence[str]:
        looks.append(len(gone))
        return digests[:10]

    assert pool.holds.sweep(digests, look, gone.extend) == digests[10:] == gone
    assert looks == [0, 6, 22]


def test_no_mark_stays_when_a_sweep_fails(pool, stored):
    def look() -> set[str]:
        raise RuntimeError("no catalogue")

    with pytest.raises(RuntimeError):
        pool.sweep(look)
    assert stored("sweeps") == {}
