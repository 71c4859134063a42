import ctypes
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from gpu_worker.bank.load_threads import load_executor
from gpu_worker.native import openmp
from gpu_worker.native.openmp import run_on_short_lived_thread, thread_team_releaser
from tests.gpu_worker.engine_driver import MakeEngine, Start, by_digest, run

MANY = 1 << 20  # values: torch uses its threads for this many


def computing_threads() -> set[str]:
    """Return the threads of this process after the caller has made torch use as many as allowed."""
    torch.ones(MANY).neg()
    return threads()


def threads() -> set[str]:
    """Return the system's numbers of this process's threads. Those of earlier tests may end at any time."""
    return set(os.listdir("/proc/self/task"))


def ended(new: set[str]) -> bool:
    """Wait until none of these is left: the system removes threads a moment after they were joined."""
    deadline = time.monotonic() + 120
    while new & threads() and time.monotonic() < deadline:
        os.sched_yield()
    return not new & threads()


pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted through /proc")


@pytest.fixture
def two_threads(request: pytest.FixtureRequest) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    request.addfinalizer(lambda: torch.set_num_threads(before))


def test_a_short_lived_thread_leaves_no_team(two_threads: None) -> None:
    before = computing_threads()  # includes this thread's own team
    new = run_on_short_lived_thread(computing_threads) - before
    assert len(new) == 2, "it has a thread and a team of two, its own included, while it runs"
    assert ended(new)
    with pytest.raises(ZeroDivisionError):
        run_on_short_lived_thread(lambda: 1 / 0)


def test_loads_use_one_thread_and_other_work_is_unaffected(two_threads: None) -> None:
    before = computing_threads()
    with load_executor(1) as executor:
        assert len(executor.submit(computing_threads).result() - before) == 1
        assert executor.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == 2


def test_an_ended_team_is_started_again(two_threads: None) -> None:
    """This can be repeated: ended threads are not counted."""

    def rounds() -> list[tuple[int, bool]]:
        end_team, found = thread_team_releaser(), []
        for _ in range(3):
            team = computing_threads() - alone
            end_team()
            found.append((len(team), ended(team)))
        return found

    with ThreadPoolExecutor(1) as executor:
        alone = executor.submit(threads).result()
        assert executor.submit(rounds).result() == [(1, True)] * 3


def test_a_waiting_engine_has_no_team(
    two_threads: None, make_engine: MakeEngine, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(by_digest())
    native = start(engine)
    monkeypatch.setattr(engine, "status", computing_threads)  # on the engine's thread
    before = threads()
    for _ in range(3):
        team = cast("set[str]", run(native.status())) - before
        assert len(team) == 1
        assert ended(team)


def test_a_library_without_the_function_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace()  # as the libgomp of other packages, older than OpenMP 5
    monkeypatch.setattr(openmp, "threadpool_info", lambda: [{"prefix": "libgomp", "filepath": "libgomp.so"}])
    monkeypatch.setattr(ctypes, "CDLL", lambda path: old)
    thread_team_releaser()()
    assert vars(old) == {}
