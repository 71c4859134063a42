"""Deadlines of requests, by this process's monotonic clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gpu_worker.errors import DeadlineExceeded


def deadline_of(arrived_at: float, timeout_s: float | None, max_request_s: float) -> float:
    """Return the arrival plus the time that the client allows, at most the time that the server allows."""
    return arrived_at + (max_request_s if timeout_s is None else min(timeout_s, max_request_s))


def seconds_until(deadline: float) -> float:
    """Return the time left, which may be negative: other machines are sent this, as no two share a clock."""
    return deadline - time.monotonic()


@asynccontextmanager
async def within(deadline: float) -> AsyncIterator[None]:
    """Raises: DeadlineExceeded, as soon as the time is over."""
    try:
        async with asyncio.timeout(seconds_until(deadline)) as limit:
            yield
    except TimeoutError as exc:
        if limit.expired():
            raise DeadlineExceeded(0) from exc
        raise
