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
    _arrived.set(time.time())


def deadline_of(timeout_s: float | None, max_request_s: float) -> float:
    """Seconds since the epoch: arrival plus what the client allows, at most what the server does."""
    allowed_s = max_request_s if timeout_s is None else min(timeout_s, max_request_s)
    return _arrived.get(time.time()) + allowed_s


@asynccontextmanager
async def within(deadline: float) -> AsyncIterator[None]:
    """Raises: DeadlineExceeded, as soon as the time is over."""
    try:
        async with asyncio.timeout(deadline - time.time()) as limit:
            yield
    except TimeoutError as exc:
        if limit.expired():
            raise DeadlineExceeded(0) from exc
        raise
