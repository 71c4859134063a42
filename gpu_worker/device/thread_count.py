"""Compute on fewer threads while other processes keep the cores busy."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_WINDOW_S = 0.5  # of one measurement
_FIRST_RETRY_S, _LAST_RETRY_S = 10.0, 160.0  # then all threads once more: programs of lower priority give cores back
_LEAST_TO_KEEP, _LEAST_TO_ADD = 0.15, 0.4  # of a core for the last thread. Two thresholds, so that it does not flicker
_NUM_TIMES, _IDLE, _IO_WAIT = 8, 3, 4  # fields of a CPU's line; those behind them are part of others


class ThreadCount:
    """The number of torch threads of the calling thread, at most `limit`.

    Each operation of a step waits for its slowest thread. On two cores that other processes share, two threads make
    less than one, because both seldom run at the same time.

    `read`: returns the seconds that all processes have used the CPUs `cpus`, or None if the system does not say.
    Without it the number stays at `limit`.
    """

    def __init__(
        self,
        limit: int,
        *,
        cpus: Collection[int],
        read: Callable[[Collection[int]], float | None] | None,
        own: Callable[[], float] = time.process_time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.count = self._limit = limit
        self._cpus, self._own, self._clock = cpus, own, clock
        self._is_fixed = limit == 1 or read is None or read(cpus) is None
        self._read = read or (lambda _: None)
        self._retry_s, self._retry_at = _FIRST_RETRY_S, math.inf
        self._is_measuring = False

    def update(self, *, computes: bool) -> None:
        """Choose the number of threads again, once in each window. Call it before each step.

        `computes`: whether the step has rows. While there are none, other processes use what this one leaves to them.
        """
        if self._is_fixed or not computes:
            self._is_measuring = False
        elif not self._is_measuring:
            self._begin()
        elif (elapsed := self._clock() - self._began) >= _WINDOW_S:
            self._use(self._choice(self._free_cores(elapsed)))
            self._begin()

    def _begin(self) -> None:
        self._is_measuring = True
        self._began, self._own_before, self._all_before = self._clock(), self._own(), self._read(self._cpus) or 0.0

    def _free_cores(self, elapsed: float) -> float:
        """Return the cores that other processes did not use in this window."""
        used = (self._read(self._cpus) or 0.0) - self._all_before
        return len(self._cpus) - max(used - (self._own() - self._own_before), 0.0) / elapsed

    def _choice(self, free: float) -> int:
        kept, added = (_clamped(free - margin, self._limit) for margin in (_LEAST_TO_KEEP, _LEAST_TO_ADD))
        if kept < self.count:
            return kept
        if added > self.count:
            self._retry_s = _FIRST_RETRY_S
            return added
        if self.count < self._limit and self._clock() >= self._retry_at:
            self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)
            return self._limit
        return self.count

    def _use(self, count: int) -> None:
        if count == self.count:
            return
        logger.debug("computing on %d threads, before on %d", count, self.count)
        self.count, self._retry_at = count, self._clock() + self._retry_s
        torch.set_num_threads(count)


def thread_count(limit: int | None, *, shares_cores: bool) -> ThreadCount:
    """Let torch use `limit` threads, if set, and return what lowers their number if `shares_cores`."""
    if limit is not None:
        torch.set_num_threads(limit)
    read = seconds_used if shares_cores else None
    return ThreadCount(torch.get_num_threads(), cpus=os.sched_getaffinity(0), read=read)


def seconds_used(cpus: Collection[int], stat: Path = Path("/proc/stat")) -> float | None:
    """Return the time for which these CPUs were not idle since the machine started, or None where Linux does not say.

    Time that the machine below took from a virtual one counts as used.
    """
    try:
        lines = [line.split() for line in stat.read_text().splitlines() if line.startswith("cpu")]
    except OSError:
        return None
    names = {f"cpu{number}" for number in cpus}
    times = [[int(ticks) for ticks in line[1:][:_NUM_TIMES]] for line in lines if line[0] in names]
    if len(times) < len(names):
        return None
    return sum(sum(each) - each[_IDLE] - each[_IO_WAIT] for each in times) / os.sysconf("SC_CLK_TCK")


def _clamped(cores: float, limit: int) -> int:
    return min(max(math.ceil(cores), 1), limit)
