"""Compute on fewer threads while other processes keep the cores busy."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_WINDOW_S = 0.5  # one measurement takes this long
_LEAST_WAIT, _LEAST_SHARE = 0.3, 0.05  # threads that wait for a core, and their share; below both all may stay
_LEAST_TO_KEEP, _LEAST_TO_ADD = 0.15, 0.4  # cores for the last thread; two thresholds, so that it does not flicker
_FIRST_RETRY_S, _LAST_RETRY_S = 10.0, 160.0  # between two attempts to use all threads
_NUM_TIMES, _IDLE, _IO_WAIT = 8, 3, 4  # fields of a CPU's line; later fields are included in earlier ones


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds since some moment. Differences of two readings are amounts of a span of time."""

    time: float
    used: float  # CPU time of all processes
    own: float  # CPU time of this process
    waited: float  # in which threads of this process were ready and had no CPU

    def __sub__(self, other: Times) -> Times:
        return Times(*(getattr(self, name) - getattr(other, name) for name in self.__slots__))

    def __add__(self, other: Times) -> Times:
        return Times(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


_NOTHING = Times(0.0, 0.0, 0.0, 0.0)


class ThreadCount:
    """The number of torch threads of the thread that calls it, at most `limit`.

    Each operation of a step waits for its slowest thread. On two cores that other processes share, two threads are
    slower than one, because both seldom run at the same time.

    `read`: returns None where the system does not say. Without it the number is always `limit`.
    """

    def __init__(
        self,
        limit: int,
        num_cpus: int,
        read: Callable[[], Times | None] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.count = self._limit = limit
        self._num_cpus, self._clock = num_cpus, clock
        self.is_fixed = limit == 1 or limit > num_cpus or read is None or read() is None
        self._read = read or (lambda: None)
        self._retry_s, self._retry_at = _FIRST_RETRY_S, math.inf
        self._was_short = False  # the last measurement asked for fewer threads
        self._started: Times | None = None  # the reading at the start of the present stretch of work
        self._seen = _NOTHING  # the sum of earlier stretches in this window
        self._due = self._paused_at = clock()

    def update(self, *, computes: bool) -> None:
        """Choose the number of threads again, twice in each second of work. Call it before and after each step.

        `computes`: whether there are rows to compute. While there are none, other processes may use every core.
        """
        now = self._clock()
        if self.is_fixed or not (computes or self._started):
            return
        if self._started is None:
            self._start(now)
        elif not computes or now >= self._due:
            self._measure(now, goes_on=computes)

    def _start(self, now: float) -> None:
        if now - self._paused_at >= self._retry_s:  # the other processes may have ended
            self._seen = _NOTHING
            self._use(self._limit)
        self._started, self._due = self._read(), now + _WINDOW_S - self._seen.time

    def _measure(self, now: float, *, goes_on: bool) -> None:
        reading = self._read()
        if reading is not None and self._started is not None:
            self._seen += reading - self._started
        if self._seen.time >= _WINDOW_S:
            self._use(self._choice(self._seen))
            self._seen = _NOTHING
        self._started, self._due, self._paused_at = reading if goes_on else None, now + _WINDOW_S, now

    def _choice(self, seen: Times) -> int:
        """Return the number of threads that fits the cores which others did not use in this span.

        Half of the time that own threads waited is added to what others used: a busy thread next to two own ones on two
        cores gets two thirds of a core, and wants a whole one. Two measurements in a row must ask for fewer threads,
        because requests that arrive together keep cores busy for a moment too.
        """
        free = self._num_cpus - max(seen.used - seen.own, 0.0) / seen.time
        waiting = seen.waited / seen.time
        was_short, self._was_short = self._was_short, False
        if waiting >= max(_LEAST_WAIT, _LEAST_SHARE * self.count):
            kept = min(self.count, _clamped(free - waiting / 2 - _LEAST_TO_KEEP, self._limit))
            self._was_short = kept < self.count
            return kept if was_short else self.count
        if self.count == self._limit:
            self._retry_s = _FIRST_RETRY_S
        elif self._clock() >= self._retry_at:  # programs of lower priority may give their cores back
            self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)
            return self._limit
        return max(self.count, _clamped(free - _LEAST_TO_ADD, self._limit))

    def _use(self, count: int) -> None:
        if count == self.count:
            return
        logger.debug("computing on %d threads, before on %d", count, self.count)
        self.count, self._retry_at = count, self._clock() + self._retry_s
        torch.set_num_threads(count)


def thread_count(limit: int | None, *, shares_cores: bool) -> ThreadCount:
    """Let torch use `limit` threads, if set. Return the ThreadCount that lowers their number if `shares_cores`."""
    if limit is not None:
        torch.set_num_threads(limit)
    if not shares_cores:
        return ThreadCount(torch.get_num_threads(), 0, None)
    cpus = os.sched_getaffinity(0)
    return ThreadCount(torch.get_num_threads(), len(cpus), lambda: read_times(cpus))


def read_times(cpus: Collection[int], proc: Path = Path("/proc")) -> Times | None:
    """Return the times of this process and of these CPUs, or None where Linux does not say."""
    try:
        used = _seconds_used(cpus, (proc / "stat").read_text())
        tasks = f"{proc}/self/task"
        waited = sum(_waited_ns(f"{tasks}/{task}/schedstat") for task in os.listdir(tasks)) / 1e9
    except (OSError, ValueError, IndexError):
        return None
    return None if used is None else Times(time.monotonic(), used, time.process_time(), waited)


def _seconds_used(cpus: Collection[int], stat: str) -> float | None:
    """Return the time for which these CPUs were not idle since the machine started. Steal time counts as used."""
    lines = [line.split() for line in stat.splitlines() if line.startswith("cpu")]
    names = {f"cpu{number}" for number in cpus}
    times = [[int(ticks) for ticks in line[1:][:_NUM_TIMES]] for line in lines if line[0] in names]
    if len(times) < len(names):
        return None
    return sum(sum(each) - each[_IDLE] - each[_IO_WAIT] for each in times) / os.sysconf("SC_CLK_TCK")


def _waited_ns(path: str) -> int:
    """Return the time for which a thread was ready to run and waited. 0 if it has ended.

    A process of Ray has many threads: `os.open` takes a third of the time of `open`.
    """
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            return int(os.read(file, 100).split()[1])
        finally:
            os.close(file)
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _clamped(cores: float, limit: int) -> int:
    return min(max(math.ceil(cores), 1), limit)
