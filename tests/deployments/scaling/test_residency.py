from __future__ import annotations

import asyncio
import pickle
import random
from collections.abc import Collection

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID, RunningReplicaInfo

from deployments.scaling import residency
from deployments.scaling.residency import HeardReports, Residency, ResidencyReport, short_digest
from gpu_worker.errors import EngineStopped
from tests.deployments.adapter_records import digest_of

DIGESTS = [digest_of(str(number)) for number in range(64)]


def short(digests: Collection[str]) -> frozenset[bytes]:
    return frozenset(map(short_digest, digests))


class FakeEngine:
    """Holds digests, and answers when told to."""

    def __init__(self) -> None:
        self.held, self.asked, self.go_on = set[str](), 0, asyncio.Event()

    async def expected(self) -> frozenset[str]:
        self.asked += 1
        await self.go_on.wait()
        return frozenset(self.held)


def heard_from(*reports: ResidencyReport) -> frozenset[bytes]:
    heard = HeardReports()
    for report in reports:
        heard.hear(report)
    return heard.held_by("w")


@pytest.mark.parametrize("seed", range(20))
async def test_lost_repeated_and_reordered_reports_leave_the_newest_heard_state(seed: int) -> None:
    chance = random.Random(seed)
    engine, heard = FakeEngine(), HeardReports()
    engine.go_on.set()
    worker = Residency("w", engine.expected)
    states: list[tuple[ResidencyReport, frozenset[bytes]]] = []  # what was sent, with the state at that time
    held: frozenset[bytes] = frozenset()
    for _ in range(60):
        new = chance.sample(DIGESTS, 3)
        held |= short(new)
        states.append((worker.report(new), held))
        if chance.random() < 0.4:
            engine.held = set(chance.sample(DIGESTS, chance.randrange(64)))
            worker.refresh()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            held = short(engine.held)
    arrived = [states[chance.randrange(60)] for _ in range(40)]  # some never, some often, in any order
    for place, (report, _) in enumerate(arrived):
        heard.hear(pickle.loads(pickle.dumps(report)))
        newest = max(arrived[: place + 1], key=lambda state: state[0].number)
        assert heard.held_by("w") == newest[1]


async def test_a_request_counts_at_once_and_the_engine_is_asked_once_at_a_time() -> None:
    engine = FakeEngine()
    worker = Residency("w", engine.expected)
    assert heard_from(worker.report(())) == frozenset()
    assert heard_from(worker.report(DIGESTS[:2]), worker.report(DIGESTS[2:3])) == short(DIGESTS[:3])
    engine.held = {DIGESTS[2], DIGESTS[9]}
    for _ in range(5):
        worker.refresh()
        await asyncio.sleep(0)
    assert engine.asked == 1 and heard_from(worker.report(())) == short(DIGESTS[:3])  # no answer waits for it
    engine.go_on.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert heard_from(worker.report(())) == short(engine.held)
    worker.refresh()
    await asyncio.sleep(0)
    assert engine.asked == 2


async def test_a_stopped_engine_leaves_the_last_state() -> None:
    async def stopped() -> frozenset[str]:
        raise EngineStopped("it has ended")

    worker = Residency("w", stopped)
    worker.refresh()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert heard_from(worker.report(DIGESTS[:1])) == short(DIGESTS[:1])


def test_workers_are_told_apart_and_the_ones_not_heard_for_longest_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(residency, "_MAX_WORKERS", 2)
    heard = HeardReports()
    for worker in "abac":  # the second report of `a` says that nothing has changed
        heard.hear(ResidencyReport(worker, 0, short_digest(digest_of(worker))))
    assert [heard.held_by(worker) for worker in "abc"] == [
        short([digest_of("a")]),
        frozenset(),
        short([digest_of("c")]),
    ]


def test_a_report_is_read_without_its_class_and_with_fields_of_a_later_version() -> None:
    sent = pickle.dumps(Residency("w", FakeEngine().expected).report(DIGESTS[:2]))
    assert b"deployments" not in sent, "an older process would not find the class"
    read = pickle.loads(sent)
    assert type(read) is tuple
    heard = HeardReports()
    for report in [(*read, 0.5, "new"), (), ("w",), ("w", 9, "text"), (9, 9, b"abcdef"), ("w", {"number": 9})]:
        heard.hear(report)
    assert heard.held_by("w") == short(DIGESTS[:2])


def test_a_change_costs_less_than_a_tenth_of_what_serves_controller_would_send() -> None:
    deployment = DeploymentID("Worker", "app")

    def info(number: int, changed: int) -> RunningReplicaInfo:
        held = sorted(digest_of(f"{number} {adapter} {changed}")[:12] for adapter in range(64))
        replica = ReplicaID(f"{number:08d}", deployment)
        return RunningReplicaInfo(replica, "node", "10.0.0.1", None, f"name {number}", 100, routing_stats={"r": held})

    whole = len(pickle.dumps([info(number, number == 7) for number in range(200)]))
    report = Residency("00000007", FakeEngine().expected).report(DIGESTS)
    one = len(pickle.dumps(report))
    assert one < 64 * 6 + 120
    # Each change goes to every router: then in the list of all workers, now in the next answer of that worker alone.
    assert whole / one > 200
