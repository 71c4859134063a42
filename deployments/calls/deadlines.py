"""When the request in hand came, and until when it may take."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

from gpu_worker.errors import DeadlineExceeded

_arrived: ContextVar[float] = ContextVar("arrived")  # of an HTTP request, before its body was read


def mark_arrival() -> None:
    """The request this task works on came now."""
    _arrived.set(time.monotonic())


def deadline_of(timeout_s: float | None, max_request_s: float) -> float:
    """Return arrival plus what the client allows, at most what the server does, by this process's monotonic clock."""
    allowed_s = max_request_s if timeout_s is None else min(timeout_s, max_request_s)
    return _arrived.get(time.monotonic()) + allowed_s


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
