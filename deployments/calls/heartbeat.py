"""Read a stream, and detect that its replica vanished without an error.

Ray raises an error when a replica dies. A node that disappears raises none for a long time: gRPC notices after minutes,
Ray's own calls after about one. Workers therefore send a heartbeat (None) every 5 s, and a stream is given up after
30 s without any item.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from enum import Enum
from typing import Generic, Protocol, TypeVar

from grpc.aio import AioRpcError
from ray.exceptions import ActorUnavailableError

from gpu_worker.errors import DeadlineExceeded

HEARTBEAT_INTERVAL_S = 5.0
HEARTBEAT_TIMEOUT_S = 30.0  # an event loop may be late, a node that is gone stays gone

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class StreamEnd(Enum):
    """Marks the end of a stream."""

    END = "end"


class StreamResponse(Protocol[T_co]):
    """Serve's response to a streaming call."""

    def __aiter__(self) -> AsyncIterator[T_co]: ...
    def cancel(self) -> None: ...


class HeartbeatStream(Generic[T]):
    """The items and heartbeats of one streaming call, which fails after `timeout_s` without either."""

    def __init__(
        self, response: StreamResponse[T | None], timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._response, self._items, self._timeout_s, self._clock = response, aiter(response), timeout_s, clock
        self._silent_at = float("inf")  # the first item may take any time: it needs a replica

    def cancel(self) -> None:
        """Cancel the work at the replica."""
        self._response.cancel()

    async def next(self, deadline: float) -> T | StreamEnd | None:
        """Return the next item, None for a heartbeat, or the end. `deadline` is a time of the clock.

        Raises: DeadlineExceeded; ActorUnavailableError if the replica fell silent or broke the call off; what the
        stream raises.
        """
        until = min(deadline, self._silent_at)
        try:
            async with asyncio.timeout(until - self._clock()) as limit:
                item = await anext(self._items, StreamEnd.END)
        except TimeoutError as exc:
            if not limit.expired():
                raise
            if until == deadline:
                raise DeadlineExceeded(0) from exc
            raise ActorUnavailableError(f"no heartbeat for {self._timeout_s:.0f} s", None) from exc
        except AioRpcError as exc:  # Serve 2.60 translates only UNAVAILABLE
            raise ActorUnavailableError(f"gRPC broke the call off: {exc.code().name}", None) from exc
        except asyncio.CancelledError as exc:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise ActorUnavailableError("the replica cancelled the call as it shut down", None) from exc
        self._silent_at = self._clock() + self._timeout_s
        return item
