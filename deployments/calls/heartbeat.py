"""A stream whose replica is gone is told by Ray's error for that; one whose replica vanished is noticed by its silence.

Where a node is gone without a word, gRPC says so after minutes only, Ray's own calls after about one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

from grpc.aio import AioRpcError
from ray.exceptions import ActorUnavailableError

SIGN_EVERY_S = 5.0
SILENCE_S = 30.0  # an event loop may be late, a node that is gone stays so

T = TypeVar("T")


async def drop_heartbeats(items: AsyncIterator[T | None], silence_s: float) -> AsyncGenerator[T]:
    """The items without the signs of life (None) among them. How long the first takes has no limit: it needs a replica.

    Raises: ActorUnavailableError, after `silence_s` without any, and where gRPC or the replica broke the call off; what
    `items` raises.
    """
    limit_s: float | None = None
    while True:
        try:
            async with asyncio.timeout(limit_s) as watch:
                item = await anext(items)
        except StopAsyncIteration:
            return
        except TimeoutError as exc:
            if watch.expired():
                raise ActorUnavailableError(f"no sign of life for {silence_s:.0f} s", None) from exc
            raise
        except AioRpcError as exc:  # of all that gRPC may say Serve 2.60 translates UNAVAILABLE alone
            raise ActorUnavailableError(f"the call was broken off: {exc.code().name}", None) from exc
        except asyncio.CancelledError as exc:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise ActorUnavailableError("the replica gave the call up as it went", None) from exc
        limit_s = silence_s
        if item is not None:
            yield item
