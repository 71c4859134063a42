"""The number of threads follows the cores that other processes leave, on a scripted machine and on this one."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from gpu_worker.native.thread_count import ThreadCount, Times, read_times, thread_count
from tests.gpu_worker.engine_driver import MakeEngine, ask, by_digest, greedy

NICE_19 = 15 / 1024  # weight of a thread of nice 19, relative to one of nice 0
STAT = """cpu  1000 0 500 9000 100 0 10 20 300 0
cpu0 500 0 250 4500 50 0 5 10 150 0
cpu1 400 7 250 4500 50 1 5 10 150 0
cpu10 900 0 0 0 0 0 0 0 0 0
intr 12 0 0
"""


@dataclass
class Machine:
    """A machine that divides its cores fairly, by weight, among busy threads; each has at most one core."""

    num_cpus: int = 2
    time: float = 100.0
    used: float = 0.0
    own: float = 0.0
    waited: float = 0.0

    def read(self) -> Times:
        return Times(self.time, self.used, self.own, self.waited)

    def threads(self, limit: int) -> ThreadCount:
        return ThreadCount(limit, self.num_cpus, self.read, lambda: self.time)

    def shares(self, own: int, others: float, weight: float) -> tuple[float, float]:
        """Return the share of a core of each own thread, and of each other one of this weight."""
        low, high = 0.0, 1e6
        for _ in range(200):
            level = (low + high) / 2
            total = own * min(1.0, level) + others * min(1.0, level * weight)
            low, high = (level, high) if total < self.num_cpus else (low, level)
        return min(1.0, low), min(1.0, low * weight)

    def pass_by(self, seconds: float, *, own: int, others: float, weight: float = 1.0) -> None:
        """Let `own` threads of this process and busy threads of others run."""
        mine, theirs = self.shares(own, others, weight)
        self.time += seconds
        self.own += seconds * own * mine
        self.used += seconds * (own * mine + others * theirs)
        self.waited += seconds * own * (1 - mine)

    def counts(
        self, threads: ThreadCount, seconds: float, *, others: float, weight: float = 1.0, step_s: float = 0.1
    ) -> list[int]:
        """Return the number of threads after each step."""
        found = []
        for _ in range(round(seconds / step_s)):
            threads.update(computes=True)
            self.pass_by(step_s, own=threads.count, others=others, weight=weight)
            threads.update(computes=True)
            found.append(threads.count)
        return found


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_core_that_others_keep_busy_is_left_to_them_and_taken_back() -> None:
    machine = Machine()
    threads = machine.threads(2)
    assert machine.counts(threads, 2, others=0) == [2] * 20
    assert machine.counts(threads, 2, others=2)[10:] == [1] * 10
    assert torch.get_num_threads() == 1
    assert machine.counts(threads, 2, others=0)[9:] == [2] * 11
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("num_cpus", "others", "expected"),
    [(2, 1, 1), (2, 2, 1), (4, 1, 3), (4, 2, 2), (8, 4, 4), (16, 8, 8), (16, 1, 15), (4, 16, 1)],
)
def test_threads_have_the_cores_that_busy_threads_of_equal_priority_leave(
    num_cpus: int, others: int, expected: int
) -> None:
    machine = Machine(num_cpus)
    threads = machine.threads(num_cpus)
    assert machine.counts(threads, 8, others=others)[-10:] == [expected] * 10


@pytest.mark.parametrize("num_cpus", [2, 4, 16, 64])
def test_programs_of_low_priority_take_no_core(num_cpus: int) -> None:
    """They run on all cores that are idle, and give them back."""
    machine = Machine(num_cpus)
    threads = machine.threads(num_cpus)
    assert set(machine.counts(threads, 60, others=num_cpus, weight=NICE_19)) == {num_cpus}
    machine.counts(threads, 3, others=num_cpus)
    assert threads.count < num_cpus
    assert machine.counts(threads, 30, others=num_cpus, weight=NICE_19)[-1] == num_cpus


def test_few_threads_that_hardly_wait_keep_their_cores() -> None:
    machine = Machine(64)
    threads = machine.threads(4)
    assert machine.counts(threads, 5, others=60) == [4] * 50
    assert machine.counts(threads, 5, others=62) == [4] * 50


def test_small_users_of_the_cores_change_nothing() -> None:
    """Such as HTTP and routing, whose threads go first."""
    machine = Machine()
    threads = machine.threads(2)
    assert machine.counts(threads, 5, others=0.5, weight=3) == [2] * 50


def test_a_burst_of_half_a_second_changes_nothing() -> None:
    """Such as the texts of many requests that arrive at once."""
    machine = Machine()
    threads = machine.threads(2)
    for _ in range(10):
        assert machine.counts(threads, 0.5, others=1, weight=3) == [2] * 5
        assert machine.counts(threads, 2, others=0.3, weight=3) == [2] * 20


def test_all_threads_are_tried_again_at_growing_intervals_where_none_waits() -> None:
    """With one busy thread of equal priority the remaining one has a core of its own, so a try costs little."""
    machine = Machine()
    threads = machine.threads(2)
    found = machine.counts(threads, 400, others=1)
    tries = np.flatnonzero(np.diff(found) > 0) / 10
    assert 4 <= len(tries) <= 7, tries
    waits = np.diff(tries).tolist()
    assert waits == sorted(waits) and waits[0] >= 10 and waits[-1] > 80
    assert found[20:].count(2) <= 12 * len(tries), "a good second each"


def test_a_thread_that_waits_is_not_joined_by_another() -> None:
    """A step with threads that get no core may take a minute."""
    machine = Machine()
    threads = machine.threads(2)
    assert machine.counts(threads, 400, others=2, weight=50)[11:] == [1] * 3989


def test_time_without_rows_is_not_measured() -> None:
    machine = Machine()
    threads = machine.threads(2)
    threads.update(computes=True)
    machine.pass_by(0.2, own=2, others=0)
    threads.update(computes=False)
    machine.pass_by(5, own=0, others=2)
    threads.update(computes=True)
    machine.pass_by(0.4, own=2, others=0)
    threads.update(computes=True)
    assert threads.count == 2


def test_short_requests_add_up_to_a_measurement() -> None:
    machine = Machine()
    threads = machine.threads(2)

    def requests(count: int, others: int) -> list[int]:
        found = []
        for _ in range(count):
            threads.update(computes=True)
            machine.pass_by(0.2, own=threads.count, others=others)
            threads.update(computes=False)
            machine.pass_by(0.3, own=0, others=others)
            found.append(threads.count)
        return found

    contended = requests(10, 2)
    assert contended[:5] == [2] * 5, "one second is needed"
    assert contended[6:] == [1] * 4
    assert requests(10, 0)[5:] == [2] * 5


def test_after_a_long_pause_all_threads_work_again() -> None:
    machine = Machine()
    threads = machine.threads(2)
    machine.counts(threads, 2, others=2)
    threads.update(computes=False)
    machine.pass_by(11, own=0, others=0)
    assert threads.count == 1
    threads.update(computes=True)
    assert threads.count == torch.get_num_threads() == 2


def test_the_number_is_fixed_where_it_cannot_follow() -> None:
    """Switched off, on a system that does not say, and with more threads than cores, which an operator chose."""
    machine = Machine()
    for fixed in (
        ThreadCount(2, 2, None, lambda: machine.time),
        ThreadCount(2, 2, lambda: None, lambda: machine.time),
        machine.threads(4),
    ):
        assert fixed.is_fixed
        assert len(set(machine.counts(fixed, 20, others=4))) == 1


def test_a_reading_that_fails_later_changes_nothing() -> None:
    machine = Machine()
    answers = iter([machine.read()])
    threads = ThreadCount(2, 2, lambda: next(answers, None), lambda: machine.time)
    assert not threads.is_fixed
    assert machine.counts(threads, 5, others=2) == [2] * 50


def test_times_are_read_for_the_named_cpus_and_all_own_threads(tmp_path: Path) -> None:
    """Idle time and waiting for disks are free; steal time is not. Guests count once."""
    (tmp_path / "stat").write_text(STAT)
    for task, waited_ns in (("7", 3_000_000_000), ("8", 500_000_000)):
        folder = tmp_path / "self" / "task" / task
        folder.mkdir(parents=True)
        (folder / "schedstat").write_text(f"99 {waited_ns} 12\n")
    (tmp_path / "self" / "task" / "9").mkdir()  # it has ended
    ticks = os.sysconf("SC_CLK_TCK")
    one, two = read_times([0], tmp_path), read_times([0, 1], tmp_path)
    assert one is not None and two is not None
    assert one.used == (500 + 250 + 5 + 10) / ticks
    assert two.used == (500 + 250 + 5 + 10 + 400 + 7 + 250 + 1 + 5 + 10) / ticks
    assert one.waited == 3.5
    assert read_times([0, 2], tmp_path) is None, "a machine that does not show this CPU"
    assert read_times([0], tmp_path / "missing") is None


def test_work_and_waiting_on_this_machine_are_counted(request: pytest.FixtureRequest) -> None:
    """Of three busy threads on one CPU two wait."""
    allowed = os.sched_getaffinity(0)
    request.addfinalizer(lambda: os.sched_setaffinity(0, allowed))
    os.sched_setaffinity(0, cpus := {min(allowed)})  # also for threads that start now
    before, data = read_times(cpus), bytes(1 << 20)
    assert before is not None
    until = before.own + 0.5

    def work() -> None:
        while time.process_time() < until:
            hashlib.sha256(data).digest()  # releases Python's lock

    with ThreadPoolExecutor(3) as executor:
        for end in [executor.submit(work) for _ in range(3)]:
            end.result()
        after = read_times(cpus)
    assert after is not None
    seen = after - before
    assert seen.own >= 0.5 and seen.used >= 0.4 and seen.waited >= 0.4


def test_an_engine_goes_on_with_fewer_threads(make_engine: MakeEngine) -> None:
    """The answer is that of an engine that always has two."""
    found = []
    for others in (0, 2):
        torch.set_num_threads(2)
        machine, engine = Machine(), make_engine(by_digest())
        engine._threads = machine.threads(2)
        answer = ask(engine, greedy("abcdef", num_new=12))
        counts = set()
        while engine.has_work:
            machine.pass_by(0.2, own=2, others=others)
            engine.step()
            assert engine.status().num_threads == torch.get_num_threads()
            counts.add(torch.get_num_threads())
        found.append((answer.tokens, counts))
    assert found == [(found[0][0], {2}), (found[0][0], {1, 2})]


def test_an_engine_ends_a_measurement_with_its_last_row(make_engine: MakeEngine) -> None:
    engine = make_engine(by_digest())
    seen: list[bool] = []
    engine._threads.update = lambda *, computes: seen.append(computes)  # type: ignore[method-assign]
    ask(engine, greedy("abcdef", num_new=3))
    engine.run_until_idle()
    assert seen == [True, True, True, True, True, False]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core is not shared")
def test_the_setting_lets_an_engine_share(make_engine: MakeEngine) -> None:
    """By default an engine on the CPU does."""
    assert thread_count(2, shares_cores=False).is_fixed
    assert not thread_count(2, shares_cores=True).is_fixed
    assert make_engine(by_digest(), num_threads=2, shares_cores=False)._threads.is_fixed
    assert not make_engine(by_digest(), num_threads=2)._threads.is_fixed
    assert torch.get_num_threads() == 2
