"""Threads beside the engine's. None of them keeps a team of OpenMP threads, for the engine's own must be the only one.

libgomp counts the threads of all teams of a process. As soon as they outnumber the cores, threads that wait for their
next task no longer spin, they sleep: the engine's team then wakes at each of a step's thousand small tasks, and a
decode step takes a fifth longer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from threadpoolctl import threadpool_info, threadpool_limits

_T = TypeVar("_T")
_OMP_PAUSE_SOFT = 1


def use_one_thread() -> None:
    """What the calling thread has torch compute from now on, it computes by itself; MKL's products are not meant."""
    torch.get_num_threads()  # torch sets a thread's number when it is first asked: not later than here
    threadpool_limits(1, user_api="openmp")


def load_executor(num_threads: int) -> ThreadPoolExecutor:
    """For the loads of adapters: threads that compute alone."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix="adapter-load", initializer=use_one_thread)


def run_on_short_lived_thread(make: Callable[[], _T]) -> _T:
    """What `make` returns or raises, on a thread that ends with it, as its team of OpenMP threads does."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(make).result()


def thread_team_releaser() -> Callable[[], None]:
    """Ends the calling thread's team of libgomp threads; its next work for several starts another, in a tenth of a ms.

    A team that has nothing to do spins on its cores for a while, in which those who bring the next work want them.
    """
    libraries = [ctypes.CDLL(found["filepath"]) for found in threadpool_info() if found["prefix"] == "libgomp"]

    def end_team() -> None:
        for library in libraries:
            library.omp_pause_resource_all(_OMP_PAUSE_SOFT)

    return end_team
