"""The requests of one engine: admitted in turn, ended when they are overdue, and counted.

Both engines keep their rows here. They differ in how they compute those that run.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from typing import Protocol

from gpu_worker.bank.device_layout import DeviceAdapter
from gpu_worker.bank.loader import AdapterLoader
from gpu_worker.config import WorkerConfig
from gpu_worker.errors import DeadlineExceeded, WaitedTooLong
from gpu_worker.front.admission import Admission, Pins, RowPlaces
from gpu_worker.front.engine_status import Counters, EngineStatus
from gpu_worker.front.fair_queue import FairQueue
from gpu_worker.front.prefetch_window import PrefetchWindow
from gpu_worker.front.request.request import Delta
from gpu_worker.front.row import Row

logger = logging.getLogger(__name__)

_WINDOW_BATCHES = 2  # batches of requests whose weights are prefetched


class Places(RowPlaces, Protocol):
    """The places for running rows, and the blocks of earlier prompts that a row may start behind."""

    def num_reused(self, row: int, /) -> int: ...
    def forget(self, digests: Collection[str], /) -> None: ...


class Residents(Pins, Protocol):
    """The adapters in the bank, and what the status says of them."""

    @property
    def resident(self) -> frozenset[str]: ...
    @property
    def occupied_rows(self) -> int: ...
    @property
    def active_rows(self) -> int: ...
    def drop(self, digests: Collection[str], /) -> None: ...


class RequestQueue:
    """The waiting and the running rows of one engine. All methods belong to the thread that computes them.

    `running`: the rows that `admit` has started, in order. The engine calls `end_running` for those that end.
    `parts`: replaces the names of fusions by the weights digests of their adapters, for a bank that holds fusions.
    `pending_parts`: see PrefetchWindow.
    """

    def __init__(
        self,
        config: WorkerConfig,
        loader: AdapterLoader,
        residency: Residents,
        places: Places,
        *,
        parts: Callable[[Iterable[str]], Iterable[str]] = iter,
        pending_parts: Callable[[str], Mapping[str, Future[DeviceAdapter]]] = lambda _: {},
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._loader, self._residency, self._places = config, loader, residency, places
        self._parts, self._clock = parts, clock
        window = PrefetchWindow(config.host_cache_bytes, _WINDOW_BATCHES * config.max_batch_size, pending_parts)
        self.running: list[Row] = []
        self._admission = Admission(loader, residency, places, window, running=self.running, clock=clock)
        self._forgetting: set[str] = set()
        self.counters = Counters()
        self.next_due = math.inf  # the time at which a request may be overdue

    @property
    def waiting(self) -> FairQueue[Row]:
        return self._admission.waiting

    def submit(self, row: Row) -> None:
        """Queue the row. Its missing adapters start loading if the prefetch window has room.

        A single tenant may use all of `max_waiting`; several tenants have equal shares. Raises: EngineFull.
        """
        if (displaced := self.waiting.displaced_by(row.tenant, self._config.max_waiting)) is not None:
            self.end_waiting(*displaced)
        if not row.capture_first_logits:  # probes are not traffic
            self._count(row)
        row.arrived_at = self._clock()
        row.start_by = row.arrived_at + self._config.max_wait_s
        self.next_due = min(self.next_due, row.start_by, row.deadline)
        self._admission.append(row)

    def requeue(self, row: Row) -> None:
        """Queue a row that gave up its place, before all others. It keeps its tokens and pins."""
        row.num_computed = 0
        self._admission.requeue(row)
        self.counters.num_preemptions += 1

    def admit(self) -> list[Row]:
        """Return the rows that run now too. Rows whose loads or plan failed get their error."""
        num_changes = self._residency.num_changes
        started, failed = self._admission.admit()
        for row, error in failed:
            self.send(row, error)
        if started:
            now = self._clock()
            for row in started:
                row.num_computed = self._places.num_reused(row.kv_row)
                if not row.has_started:
                    row.has_started, row.queued_s = True, now - row.arrived_at
                    row.num_cached_tokens = row.num_computed
                    self.counters.num_cached_tokens += row.num_computed
            self.running += started
        if started or self._residency.num_changes != num_changes:  # a row may have its adapters before it has KV
            self._residency.settle()
        return started

    def end_running(self, row: Row) -> None:
        """Take a row that has ended out of the running ones. The engine frees what it had."""
        self.running.remove(row)
        self._admission.end(row)

    def remove(self, row: Row) -> None:
        """Take a waiting row out of the queue, without an event for its client."""
        self._admission.remove(row)

    def end_waiting(self, row: Row, error: Exception) -> None:
        """Take a waiting row out of the queue. Its client gets the error, even if releasing its pins raises."""
        try:
            self._admission.remove(row)
        finally:
            self.send(row, error)

    def end_all_waiting(self, error: Exception) -> None:
        """End every waiting row, even if releasing pins raises, as it does on a lost device."""
        waiting = list(self.waiting)
        try:
            self._admission.clear()
        finally:
            for row in waiting:
                self.send(row, error)

    def end_overdue(self) -> list[tuple[Row, DeadlineExceeded]]:
        """End the waiting rows past their deadline, and those that have waited too long to start.

        Return the running rows past their deadline with their error. The engine ends them.
        """
        now = self._clock()
        if now < self.next_due:
            return []
        for row in [row for row in self.waiting if row.deadline <= now or row.start_by <= now]:
            is_past = row.deadline <= now
            self.end_waiting(
                row, DeadlineExceeded(row.num_new_tokens) if is_past else WaitedTooLong(self._config.max_wait_s)
            )
        due = [row.deadline for row in self.running if row.deadline > now]
        self.next_due = min(due + [min(row.deadline, row.start_by) for row in self.waiting], default=math.inf)
        return [(row, DeadlineExceeded(row.num_new_tokens)) for row in self.running if row.deadline <= now]

    def load(self, digests: Collection[str]) -> list[Future[DeviceAdapter]]:
        """Start loading the adapters that are not in the bank, and return the loads."""
        return [self._loader.load(digest) for digest in digests if digest not in self._residency]

    def forget(self, digests: Collection[str]) -> bool:
        """Drop these weights, and the blocks they computed, from the bank, its engine's caches and host memory.

        Return whether they are all gone. Weights in use are dropped when the last request or load that uses them ends,
        even if it came after this call. A later request fetches the weights again.
        """
        self._forgetting.update(digests)
        self.drop_forgotten()
        return self._forgetting.isdisjoint(digests)

    def drop_forgotten(self) -> None:
        """Drop the weights to forget that are no longer used or being loaded. Call after rows have ended."""
        if not self._forgetting:
            return
        used = [digest for row in (*self.running, *self.waiting) for digest in row.weights_digests]
        unused = self._forgetting.difference(self._parts([*used, *self._loader.loading]))
        for digest in unused:
            self._loader.discard(digest)
        self._residency.drop(unused)
        self._places.forget(unused)
        self._forgetting -= unused

    def expected(self) -> frozenset[str]:
        """Return the weights digests in the bank and those that waiting requests will bring in."""
        waiting = [digest for row in self.waiting for digest in row.weights_digests]
        return self._residency.resident.union(self._parts(waiting))

    def status(
        self, *, kv_tokens: int, free_kv_tokens: int, prefix_cache_tokens: int = 0, num_threads: int = 0
    ) -> EngineStatus:
        """Return the state of the engine, with what it says of its KV cache and threads."""
        return EngineStatus(
            resident=self._residency.resident,
            occupied_rows=self._residency.occupied_rows,
            active_rows=self._residency.active_rows,
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            waiting_tokens=sum(row.expected_len for row in self.waiting),
            free_kv_rows=self._places.num_free,
            free_kv_tokens=free_kv_tokens,
            kv_tokens=kv_tokens,
            host_cache_bytes=self._loader.cached_bytes,
            num_forgetting=len(self._forgetting),
            prefix_cache_tokens=prefix_cache_tokens,
            num_threads=num_threads,
            counters=self.counters.copy(),
        )

    def send(self, row: Row, event: Delta | Exception) -> bool:
        """Send the event to the request's client. Return False, after a warning, if the client is gone."""
        try:
            row.sink(event)
        except Exception:
            logger.warning("the client of request %s is gone", row.request_id, exc_info=True)
            return False
        return True

    def _count(self, row: Row) -> None:
        """Count the request. The adapters of a fusion that is in the bank are in the bank."""
        digests = row.weights_digests
        in_bank = set(self._parts(digest for digest in digests if digest in self._residency))
        self.counters.count_request([*self._parts(digests)], in_bank, self._loader)
