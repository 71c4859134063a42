"""Threads whose calls share turns and places among tenants."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any

import pytest

from gpu_worker.errors import EngineFull, EngineStopped
from gpu_worker.front.fair_threads import FairThreads

PATIENCE_S = 60.0  # only a failing test waits this long


class Held:
    """Calls of one thread whose first call holds it until `release`."""

    def __init__(self, **changes: Any) -> None:
        settings: dict[str, Any] = {"num_threads": 1, "max_calls": 100, "full": "no room"}
        self.threads = FairThreads("test", **{**settings, **changes})
        self.started: list[str] = []
        self._began, self._released = threading.Event(), threading.Event()
        self._first = self.threads.submit("first", self._hold)
        assert self._began.wait(PATIENCE_S)

    def submit(self, tenant: str, name: str) -> Future[str]:
        return self.threads.submit(tenant, partial(self._note, name))

    def release(self) -> None:
        self._released.set()
        self._first.result(PATIENCE_S)

    def _hold(self) -> None:
        self._began.set()
        self._released.wait(PATIENCE_S)

    def _note(self, name: str) -> str:
        self.started.append(name)
        return name


@pytest.fixture
def hold() -> Iterator[Callable[..., Held]]:
    made: list[Held] = []

    def make(**changes: Any) -> Held:
        made.append(Held(**changes))
        return made[-1]

    yield make
    for held in made:
        held.release()
        held.threads.close()


def test_tenants_take_turns_whatever_the_number_of_their_calls(hold: Callable[..., Held]) -> None:
    held = hold()
    many = [held.submit("many", f"m{number}") for number in range(5)]
    few = [held.submit("few", f"f{number}") for number in range(2)]
    held.release()
    assert [call.result(PATIENCE_S) for call in (*few, *many)] == ["f0", "f1", "m0", "m1", "m2", "m3", "m4"]
    assert held.started == ["m0", "f0", "m1", "f1", "m2", "m3", "m4"]


def test_a_tenant_may_have_to_leave_threads_free_for_others() -> None:
    """Of four threads one tenant holds two. What it has to wait with starts as soon as it may."""
    threads = FairThreads("test", num_threads=4, max_calls=100, full="no room", leaves_room=True)
    released, begun, most, lock = threading.Event(), threading.Semaphore(0), 0, threading.Lock()
    running = 0

    def hold() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        begun.release()
        assert released.wait(PATIENCE_S)
        with lock:
            running -= 1

    many = [threads.submit("many", hold) for _ in range(8)]
    assert begun.acquire(timeout=PATIENCE_S) and begun.acquire(timeout=PATIENCE_S)
    assert threads.submit("few", lambda: "at once").result(PATIENCE_S) == "at once"
    released.set()
    for call in many:
        call.result(PATIENCE_S)
    assert most == 2
    threads.close()


def test_a_lone_tenant_may_use_every_place(hold: Callable[..., Held]) -> None:
    held = hold(max_calls=5)  # one of them runs
    waiting = [held.submit("a", str(number)) for number in range(4)]
    with pytest.raises(EngineFull, match="no room"):
        held.submit("a", "too many")
    held.release()
    assert [call.result(PATIENCE_S) for call in waiting] == ["0", "1", "2", "3"]


def test_the_newest_call_of_the_largest_tenant_makes_room_for_another(hold: Callable[..., Held]) -> None:
    held = hold(max_calls=5)
    waiting = [held.submit("a", str(number)) for number in range(4)]
    other = [held.submit("b", "x"), held.submit("b", "y")]
    for displaced in waiting[2:]:
        with pytest.raises(EngineFull, match="no room"):
            displaced.result(0)
    with pytest.raises(EngineFull, match="no room"):
        held.submit("b", "beyond its share")
    held.release()
    assert [call.result(PATIENCE_S) for call in (*waiting[:2], *other)] == ["0", "1", "x", "y"]
    assert held.started == ["0", "x", "1", "y"]


def test_a_cancelled_call_frees_its_place_and_does_not_run(hold: Callable[..., Held]) -> None:
    held = hold(max_calls=2)
    left = held.submit("a", "left")
    assert left.cancel()
    stays = held.submit("a", "stays")
    held.release()
    assert stays.result(PATIENCE_S) == "stays" and held.started == ["stays"]
    with pytest.raises(CancelledError):
        left.result(0)


def test_the_error_of_a_call_is_its_own(hold: Callable[..., Held]) -> None:
    held = hold()
    failing = held.threads.submit("a", lambda: 1 // 0)
    following = held.submit("a", "next")
    held.release()
    with pytest.raises(ZeroDivisionError):
        failing.result(PATIENCE_S)
    assert following.result(PATIENCE_S) == "next"


def test_a_call_that_panics_answers_and_frees_its_place() -> None:
    """A panic of a library in Rust is no Exception."""
    threads = FairThreads("test", num_threads=1, max_calls=1, full="no room")

    def panic() -> None:
        raise BaseException("a panic")

    with pytest.raises(RuntimeError, match="a panic"):
        threads.submit("a", panic).result(PATIENCE_S)
    assert threads.submit("a", lambda: "next").result(PATIENCE_S) == "next"
    threads.close()


def test_calls_that_wait_when_the_threads_close_fail(hold: Callable[..., Held]) -> None:
    held = hold()
    waiting = held.submit("a", "late")
    held.threads.close()
    with pytest.raises(EngineStopped):
        waiting.result(0)
    with pytest.raises(EngineStopped):
        held.submit("a", "later")
    assert held.started == []


def test_the_nice_value_applies_to_the_threads_only() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    threads = FairThreads("nice", num_threads=1, max_calls=1, full="", niceness=3)
    found = threads.submit("a", lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    assert found.result(PATIENCE_S) == min(before + 3, 19)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
    threads.close()
