"""The threads that decode and check adapters, beside an engine that needs the cores."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from threadpoolctl import threadpool_limits


def use_one_thread() -> None:
    """Let torch use only the calling thread for the work it submits from now on. Does not affect MKL's products."""
    torch.get_num_threads()  # torch initialises the setting on first use, which must come before the limit
    threadpool_limits(1, user_api="openmp")


def load_executor(num_threads: int) -> ThreadPoolExecutor:
    """Return an executor for adapter loads whose threads use no OpenMP team."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix="adapter-load", initializer=use_one_thread)
