"""The number of threads follows the cores that other processes leave, on a scripted machine and on this one."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from gpu_worker.device.thread_count import ThreadCount, seconds_used, thread_count
from tests.gpu_worker.engine_driver import MakeEngine, ask, by_digest, greedy

STAT = """cpu  1000 0 500 9000 100 0 10 20 300 0
cpu0 500 0 250 4500 50 0 5 10 150 0
cpu1 400 7 250 4500 50 1 5 10 150 0
cpu10 900 0 0 0 0 0 0 0 0 0
intr 12 0 0
"""


@dataclass
class Machine:
    """A machine whose processes use their cores evenly."""

    num_cpus: int = 2
    own: float = 0.0
    all: float = 0.0
    now: float = 100.0

    def run(self, seconds: float, *, own: float, others: float) -> None:
        """Let this process and all others use so many cores."""
        assert own + others <= self.num_cpus
        self.now += seconds
        self.own += seconds * own
        self.all += seconds * (own + others)

    def count(self, limit: int) -> ThreadCount:
        return ThreadCount(
            limit, cpus=range(self.num_cpus), read=lambda _: self.all, own=lambda: self.own, clock=lambda: self.now
        )

    def counts(self, threads: ThreadCount, seconds: float, *, others: float, wants: float = 64) -> list[int]:
        """Return the number after each half second next to others. This process takes what is left for its threads."""
        found = []
        for _ in range(round(seconds * 2)):
            threads.update(computes=True)
            self.run(0.5, own=min(threads.count, wants, self.num_cpus - others), others=others)
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
    threads = machine.count(2)
    assert machine.counts(threads, 2, others=0.0) == [2] * 4
    assert machine.counts(threads, 2, others=1.0) == [1] * 4
    assert torch.get_num_threads() == 1
    assert machine.counts(threads, 2, others=0.0) == [2] * 4
    assert torch.get_num_threads() == 2


def test_small_users_of_the_cores_change_nothing() -> None:
    """Such as HTTP and routing: up to 0.8 of a core they leave both threads, and 0.65 does not give one back."""
    machine = Machine()
    threads = machine.count(2)
    assert machine.counts(threads, 5, others=0.8) == [2] * 10
    assert machine.counts(threads, 1, others=0.9) == [1] * 2
    assert machine.counts(threads, 5, others=0.65) == [1] * 10
    assert machine.counts(threads, 1, others=0.55) == [2] * 2


def test_own_work_and_idle_cores_do_not_count() -> None:
    machine = Machine(num_cpus=64)
    threads = machine.count(4)
    assert machine.counts(threads, 2, others=0.0, wants=1.5) == [4] * 4
    assert machine.counts(threads, 2, others=59.0) == [4] * 4
    assert machine.counts(threads, 1, others=61.5) == [3] * 2
    assert machine.counts(threads, 1, others=63.5) == [1] * 2
    assert machine.counts(threads, 1, others=64.0) == [1] * 2


def test_all_threads_are_tried_again_at_growing_intervals() -> None:
    machine = Machine()
    threads = machine.count(2)
    found = machine.counts(threads, 200, others=1.0)
    tries = [index / 2 for index, count in enumerate(found) if count == 2]
    assert 4 <= len(tries) <= 6, tries
    waits = np.diff(tries).tolist()
    assert waits == sorted(waits) and waits[0] >= 10 and waits[-1] >= 80
    assert all(found[round(2 * at) + 1] == 1 for at in tries if 2 * at + 1 < len(found)), "one window each"


def test_a_program_that_gives_way_does_not_keep_a_core() -> None:
    """It takes an idle core, and leaves it once it is wanted: the next try keeps all threads."""
    machine = Machine()
    threads = machine.count(2)
    found = []
    for _ in range(60):
        threads.update(computes=True)
        others = 1.0 if threads.count == 1 or not found else 0.1
        machine.run(0.5, own=2 - others, others=others)
        threads.update(computes=True)
        found.append(threads.count)
    assert found[0] == 1 and found[-20:] == [2] * 20


def test_time_without_rows_is_not_measured() -> None:
    machine = Machine()
    threads = machine.count(2)
    threads.update(computes=True)
    machine.run(0.3, own=2.0, others=0.0)
    threads.update(computes=False)
    machine.run(60, own=0.0, others=2.0)
    threads.update(computes=True)
    machine.run(0.4, own=0.0, others=2.0)
    threads.update(computes=True)
    assert threads.count == 2, "no window has ended"
    machine.run(0.2, own=0.0, others=2.0)
    threads.update(computes=True)
    assert threads.count == 1


@pytest.mark.parametrize("read", [None, lambda _: None], ids=["switched off", "a system that does not say"])
def test_the_number_is_fixed_where_it_cannot_follow(read: None) -> None:
    machine = Machine()
    threads = ThreadCount(2, cpus=range(2), read=read, own=lambda: machine.own, clock=lambda: machine.now)
    assert machine.counts(threads, 20, others=2.0) == [2] * 40


def test_the_setting_fixes_the_number() -> None:
    for shares_cores in (False, True):
        threads = thread_count(2, shares_cores=shares_cores)
        assert threads.count == torch.get_num_threads() == 2
        assert threads._is_fixed is not shares_cores


def test_time_in_use_is_read_for_the_named_cpus_only(tmp_path: Path) -> None:
    """Idle time and waiting for disks are free; time taken by the machine below is not. Guests count once."""
    stat = tmp_path / "stat"
    stat.write_text(STAT)
    ticks = os.sysconf("SC_CLK_TCK")
    assert seconds_used([0], stat) == (500 + 250 + 5 + 10) / ticks
    assert seconds_used([0, 1], stat) == (500 + 250 + 5 + 10 + 400 + 7 + 250 + 1 + 5 + 10) / ticks
    assert seconds_used([0, 2], stat) is None, "a machine that does not show this CPU"
    assert seconds_used([0], tmp_path / "missing") is None


def test_work_on_this_machine_is_counted() -> None:
    cpus: Collection[int] = os.sched_getaffinity(0)
    before, own = seconds_used(cpus), time.process_time()
    assert before is not None
    while time.process_time() < own + 0.5:
        sum(range(1000))
    after = seconds_used(cpus)
    assert after is not None and after - before >= 0.4


def test_an_engine_goes_on_with_fewer_threads(make_engine: MakeEngine) -> None:
    """The answer is that of an engine that always has two."""
    found = []
    for others in (0.0, 1.0):
        torch.set_num_threads(2)
        machine, engine = Machine(), make_engine(by_digest())
        engine._threads = machine.count(2)
        answer = ask(engine, greedy("abcdef", num_new=12))
        counts = set()
        while engine.has_work:
            engine.step()
            machine.run(0.2, own=1.0, others=others)
            assert engine.status().num_threads == torch.get_num_threads()
            counts.add(torch.get_num_threads())
        found.append((answer.tokens, counts))
    assert found == [(found[0][0], {2}), (found[0][0], {1, 2})]
