"""Move requests from the queue to the running batch, in turn and only with all adapters in the bank."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import chain
from typing import Protocol

from gpu_worker.bank.device_layout import DeviceAdapter
from gpu_worker.bank.loader import AdapterLoader
from gpu_worker.bank.residency import RowAssignment
from gpu_worker.front.fair_queue import FairQueue
from gpu_worker.front.prefetch_window import PrefetchWindow
from gpu_worker.front.prefix import Prefix
from gpu_worker.front.reservations import Reservations
from gpu_worker.front.row import Row

_MOST_REFUSED = 8  # rows of a tenant in a walk, before its rows without a place in the window are skipped


class RowPlaces(Protocol):
    """The places for running rows: a KvCache, or a count of rows if the engine's own cache is elsewhere."""

    num_freed: int  # rows freed, or awaited prefixes computed, since the start

    @property
    def num_free(self) -> int: ...
    def is_coming(self, num_tokens: int, prefix: Prefix | None) -> bool: ...
    def fits(self, num_tokens: int, prefix: Prefix | None) -> bool: ...
    def allocate(self, num_tokens: int, longest_len: int, prefix: Prefix | None) -> int: ...


class Pins(Protocol):
    """The adapters in the bank and their pins: a RowAssignment, or several."""

    @property
    def num_changes(self) -> int: ...
    def __contains__(self, digest: object) -> bool: ...
    def part_of(self, digests: Sequence[str]) -> RowAssignment: ...
    def try_pin(self, digests: Sequence[str], loaded: Mapping[str, DeviceAdapter]) -> bool: ...
    def unpin(self, digests: Sequence[str]) -> None: ...
    def settle(self) -> None: ...


class Admission:
    """The waiting rows. The weights of the next ones are prefetched within `window`.

    A row brings all its adapters into the bank or none, and does not block others while it waits, unless it was passed
    over so often that it reserves its part of the bank (see Reservations). A row that has its adapters but does not fit
    the KV cache blocks all rows behind it. A row whose prompt begins like one that is being computed waits for those
    blocks, and rows behind it start before it. All three wait only for running rows, which wait for nothing, so there
    is no deadlock.

    `running`: the rows that were started and have not ended. Call `end` for each that ends.
    """

    def __init__(
        self,
        loader: AdapterLoader,
        residency: Pins,
        kv_cache: RowPlaces,
        window: PrefetchWindow,
        *,
        running: Sequence[Row],
        clock: Callable[[], float],
    ) -> None:
        self._loader, self._residency, self._kv_cache, self._window = loader, residency, kv_cache, window
        self._running = running
        self.waiting = FairQueue[Row]()
        self._reservations = Reservations(clock)
        self._started: list[Row] = []
        self._failed: list[tuple[Row, Exception]] = []
        self._refused: list[Row] = []  # rows of this walk that the bank had no room for
        self._num_refused = Counter[str]()  # those rows by tenant
        self._waiting_for_blocks: set[Row] = set()  # rows of this walk whose prompt's beginning is being computed
        self._is_full = False  # the KV cache has no room for the next row
        self._num_joined = 0  # rows appended, requeued or removed
        self._seen: tuple[int, ...] | None = None  # state when no row could start; None: search again

    def append(self, row: Row) -> None:
        """Queue the row. If the window has room, start loading its missing adapters."""
        self.waiting.append(row)
        self._num_joined += 1
        if self.waiting.is_first(row):
            self._find_loads(row)

    def requeue(self, row: Row) -> None:
        """Requeue a preempted row before all others. Its adapters stay pinned, so it needs only KV."""
        self.waiting.requeue(row)
        self._num_joined += 1

    def remove(self, row: Row) -> None:
        """Remove the row from the queue and release its pins."""
        self.waiting.remove(row)
        self.end(row)
        self._num_joined += 1
        self._window.discard(row)
        if row.is_pinned:
            self._residency.unpin(row.weights_digests)
            self._residency.settle()
            row.is_pinned = False

    def end(self, row: Row) -> None:
        """Let others reserve the part of the bank that this row reserved, if it did."""
        self._reservations.end(row)

    def clear(self) -> list[Row]:
        """Remove all rows from the queue and return them."""
        rows = list(self.waiting)
        for row in rows:
            self.remove(row)
        return rows

    def admit(self) -> tuple[list[Row], list[tuple[Row, Exception]]]:
        """Return the rows that start now, and those whose loads or plan failed. The caller settles the bank.

        If nothing has changed since no row could start, skip the search, because thousands of rows may wait.
        """
        self._started, self._failed = [], []
        num_ended = self._loader.num_ended  # loads end on other threads; later ones count for the next call
        if self._seen != self._state(num_ended):
            self._walk()
            num_failed = 0
            while num_failed != len(self._failed):  # their part of the window is for rows that come before them
                num_failed = len(self._failed)
                self._walk()
            waits_for_growth = (
                self._is_full and self._kv_cache.num_free > 0
            )  # a growing row may soon need no spare page
            is_settled = not (self._started or self._failed or waits_for_growth)
            self._seen = self._state(num_ended) if is_settled else None
        return self._started, self._failed

    def _state(self, num_ended: int) -> tuple[int, ...]:
        """Return counters of which one rises whenever a waiting row may become able to start."""
        return num_ended, self._residency.num_changes, self._kv_cache.num_freed, self._num_joined

    def _walk(self) -> None:
        """Start rows in turn while there is KV, then begin prefetches."""
        self._is_full = self._kv_cache.num_free == 0
        self._window.refresh()
        self._refused.clear()
        self._num_refused.clear()
        self._waiting_for_blocks.clear()
        for row in self.waiting.requeued:
            if not self._is_full:
                self._try_start(row)
        for row in self._reservations.rows:
            if not self._is_full:
                self._try_start(row)
            self._reservations.update(row, has_weights=self._find_loads(row) is not None)
        turns = self.waiting.turns(self._waiting_for_blocks)
        for row in turns:
            if self._is_full:
                self._prefetch(chain([row], turns))
                break
            if row.is_pinned or not row.plan.adapters or not self._reservations.hold_up(self._part_of(row), row):
                self._try_start(row)

    def _prefetch(self, rows: Iterator[Row]) -> None:
        """Begin the loads of rows that cannot start yet, in turn, while the window has room for their tenants."""
        tenants = {tenant for tenant in self.waiting.tenants if self._window.has_room_for(tenant)}
        for row in rows:
            if not tenants:
                break
            if row.tenant in tenants:
                self._find_loads(row)
                if not self._window.has_room_for(row.tenant):
                    tenants.remove(row.tenant)

    def _part_of(self, row: Row) -> RowAssignment:
        return self._residency.part_of(row.weights_digests)

    def _uses(self, row: Row, part: RowAssignment) -> bool:
        return bool(row.plan.adapters) and self._part_of(row) is part

    def _find_loads(self, row: Row) -> dict[str, Future[DeviceAdapter]] | None:
        """Return the ended loads of the row's missing adapters, or None while one of them has not ended.

        A row with a place in the window begins its loads and keeps the weights in host memory. Another row begins none,
        but may use weights that are there. It is not tried if the bank has refused many rows of its tenant, because
        hundreds of rows may wait.
        """
        missing = [digest for digest in row.adapter_set if digest not in self._residency]
        loads = {digest: row.loads[digest] for digest in missing if digest in row.loads}
        if len(loads) < len(missing):
            has_place = row in self._window or self._window.has_room_for(row.tenant)
            if not has_place and self._num_refused[row.tenant] >= _MOST_REFUSED:
                return None
            for digest in missing:
                load = loads.get(digest) or (self._loader.load if has_place else self._loader.find)(digest)
                if load is None:
                    return None
                loads[digest] = load
            if has_place:
                row.loads.update(loads)
                self._window.add(row)
        return loads if all(load.done() for load in loads.values()) else None

    def _try_start(self, row: Row) -> None:
        """Start the row, fail it, or let it wait."""
        loads = self._find_loads(row)
        if loads is None:
            return
        if self._kv_cache.is_coming(len(row.tokens), row.prefix):
            self._waiting_for_blocks.add(row)
            return
        try:
            self._pin(row, loads)
        except Exception as exc:  # a failed load or plan concerns all rows with the same adapters
            self._fail(row, exc)
            return
        if not row.is_pinned:
            self._refused.append(row)
            self._num_refused[row.tenant] += 1
            part = self._part_of(row)
            users = (user for user in (*self._running, *self._started) if self._uses(user, part))
            self._reservations.reserve(part, row, users)
        elif self._kv_cache.fits(len(row.tokens), row.prefix):
            self._start(row)
        else:
            self._is_full = True

    def _start(self, row: Row) -> None:
        self.waiting.dequeue(row)
        self._window.discard(row)  # its weights are in the bank now
        row.kv_row = self._kv_cache.allocate(len(row.tokens), row.longest_len, row.prefix)
        row.start_by = math.inf
        self._started.append(row)
        self._is_full = self._kv_cache.num_free == 0

    def _pin(self, row: Row, loads: Mapping[str, Future[DeviceAdapter]]) -> None:
        """Bring the row's adapters into the bank if there is room, which passes over the rows that it refused.

        Raises: the error of the row's loads or plan.
        """
        if row.is_pinned:
            return
        loaded = {digest: load.result() for digest, load in loads.items()}
        row.is_pinned = self._residency.try_pin(row.weights_digests, loaded)
        if row.is_pinned and row.adapter_set:
            part = self._part_of(row)
            for refused in self._refused:
                if self._part_of(refused) is part:
                    refused.num_passes += 1

    def _fail(self, row: Row, error: Exception) -> None:
        for companion in self.waiting.same_adapters(row):
            self.remove(companion)
            self._failed.append((companion, error))
