"""Threads whose calls share turns and places among tenants."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from gpu_worker.errors import EngineFull, EngineStopped
from gpu_worker.front.fair_queue import FairQueue

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Call:
    """One call that waits for a thread."""

    tenant: str
    work: Callable[[], Any]
    result: Future[Any] = field(default_factory=Future)
    adapter_set: tuple[str, ...] = ()


class FairThreads:
    """Threads that run the calls of tenants in turn. May be used from any thread.

    At most `max_calls` calls wait or run. One tenant may have all of them; when others arrive, the newest waiting call
    of the tenant that has most makes room, as in FairQueue. A call whose future is cancelled leaves the queue.
    """

    def __init__(
        self, name: str, *, num_threads: int, max_calls: int, full: str, niceness: int = 0, leaves_room: bool = False
    ) -> None:
        """`full`: the message for a call without room. `niceness`: nice value of these threads only.

        `leaves_room`: a tenant may hold at most as many threads as remain free, and one; for calls that take minutes.
        """
        self._max_calls, self._full = max_calls, full
        self._queue = FairQueue[_Call]()
        self._num_threads, self._leaves_room = num_threads, leaves_room
        self._running: Counter[str] = Counter()
        self._is_closed = False
        self._lock = threading.Lock()
        # Linux: the nice value applies to the calling thread only.
        self._executor = ThreadPoolExecutor(num_threads, name, initializer=partial(os.nice, niceness))

    def submit(self, tenant: str, work: Callable[[], T]) -> Future[T]:
        """Queue the call and return its future, which fails with EngineFull if another tenant takes its place.

        Raises: EngineFull, EngineStopped.
        """
        call = _Call(tenant, work)
        with self._lock:
            if self._is_closed:
                raise EngineStopped("the engine has stopped")
            displaced = self._make_room(tenant)
            self._queue.append(call)
            self._executor.submit(self._run_next)
        if displaced is not None:
            _fail(displaced, EngineFull(self._full))
        call.result.add_done_callback(lambda _: self._drop(call))
        return call.result

    def close(self) -> None:
        """Start no more calls. Those that wait fail with EngineStopped."""
        with self._lock:
            self._is_closed = True
            waiting = list(self._queue)
            for call in waiting:
                self._queue.remove(call)
        self._executor.shutdown(wait=False, cancel_futures=True)
        for call in waiting:
            _fail(call, EngineStopped("the engine has stopped"))

    def _make_room(self, tenant: str) -> _Call | None:
        """Remove and return the call that makes room for this tenant, None if there is room. Raises: EngineFull."""
        max_waiting = self._max_calls - self._running.total()
        if len(self._queue) < max_waiting:
            return None
        displaced = self._queue.row_to_displace(tenant, max_waiting)
        if displaced is None:
            raise EngineFull(self._full)
        self._queue.remove(displaced)
        return displaced

    def _run_next(self) -> None:
        with self._lock:
            call = next((call for call in self._queue.turns() if self._may_start(call.tenant)), None)
            if call is None:  # the call that this turn was for has left, or waits until its tenant holds fewer threads
                return
            self._queue.dequeue(call)
            self._running[call.tenant] += 1
        settle = _outcome(call)
        with self._lock:
            self._running[call.tenant] -= 1
            if not self._running[call.tenant]:
                del self._running[call.tenant]
            if self._leaves_room and len(self._queue) and not self._is_closed:
                self._executor.submit(self._run_next)  # for a call that was passed over
        settle()

    def _may_start(self, tenant: str) -> bool:
        free = self._num_threads - self._running.total()
        return not self._leaves_room or self._running[tenant] < free

    def _drop(self, call: _Call) -> None:
        with self._lock:
            if call in self._queue:
                self._queue.remove(call)


def _outcome(call: _Call) -> Callable[[], None]:
    """Run the call unless its caller has left. Return a function that sets its result."""
    if not call.result.set_running_or_notify_cancel():
        return lambda: None
    try:
        return partial(call.result.set_result, call.work())
    except Exception as exc:
        return partial(call.result.set_exception, exc)
    except BaseException as exc:  # a panic of a library, which callers do not expect
        failed = RuntimeError(f"the call ended with {exc!r}")
        failed.__cause__ = exc
        return partial(call.result.set_exception, failed)


def _fail(call: _Call, error: Exception) -> None:
    """Fail a call that has not started, unless its caller has left."""
    if call.result.set_running_or_notify_cancel():
        call.result.set_exception(error)
