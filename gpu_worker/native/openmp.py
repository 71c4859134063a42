"""Keep the engine's OpenMP team the only one in the process.

libgomp counts the threads of all teams in a process. If they outnumber the cores, waiting threads sleep instead of
spinning. The engine's team would then wake up at each of a step's thousand small tasks, and a decode step would take a
fifth longer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_info

_T = TypeVar("_T")
_OMP_PAUSE_SOFT = 1


def run_on_short_lived_thread(make: Callable[[], _T]) -> _T:
    """Run `make` on a short-lived thread, so that the OpenMP team it starts ends with it."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(make).result()


def thread_team_releaser() -> Callable[[], None]:
    """Return a function that ends the calling thread's libgomp team. The next parallel work starts a new one in 0.1 ms.

    An idle team spins on its cores for a while and so delays the threads that submit the next work.
    """
    found = [ctypes.CDLL(found["filepath"]) for found in threadpool_info() if found["prefix"] == "libgomp"]
    libraries = [library for library in found if hasattr(library, "omp_pause_resource_all")]  # old ones lack it

    def end_team() -> None:
        for library in libraries:
            library.omp_pause_resource_all(_OMP_PAUSE_SOFT)

    return end_team
