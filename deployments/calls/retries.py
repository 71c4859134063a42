"""Calls that are made again where the replica that worked on them died. Only the Ingress makes calls again.

What means that a replica died, in Ray 2.60: ActorDiedError and ActorUnavailableError, the two RayActorErrors: its
process or the way to it is gone; ObjectLostError: its answer was lost with its node. What the replica itself raised
comes as a RayTaskError, and is its answer even where it tells of another actor's death. A call that a dead replica had
not accepted yet is sent to another one by Serve itself, and does not count here.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from deployments.errors import PoisonRequest
from gpu_worker.errors import EngineStopped

logger = logging.getLogger(__name__)

T = TypeVar("T")
MAX_RETRIES = 2


async def retry_on_replica_death(method: Any, *args: Any) -> Any:
    """What a handle's method answers, for calls that may run twice: reads, and writes that leave the same behind.

    Raises: Poisoned, after a third replica died of it; and what the method raises.
    """
    failures = AttemptCounter()
    while True:
        try:
            return await method.remote(*args)
        except Exception as exc:
            failures.add(exc)


async def retry_stream(begin: Callable[[], AsyncGenerator[T]], *, whole: bool) -> AsyncGenerator[T]:
    """What `begin` yields, begun again while nothing was handed on. `whole`: nothing is before the end.

    Raises: Poisoned, after a third replica died of it; and what the stream raises.
    """
    failures, has_left = AttemptCounter(), False
    kept: list[T] = []
    while True:
        kept.clear()
        try:
            async with aclosing(begin()) as items:
                async for item in items:
                    if whole:
                        kept.append(item)
                    else:
                        has_left = True
                        yield item
            break
        except Exception as exc:
            if has_left:
                raise
            failures.add(exc)
    for item in kept:
        yield item


class AttemptCounter:
    """How often one call's replica failed it."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, error: Exception) -> None:
        """Raises: what ends the call: `error`, where it is the call's own or an engine failed it for the third time."""
        is_death = isinstance(error, RayActorError | ObjectLostError) and not isinstance(error, RayTaskError)
        if not is_death and not isinstance(error, EngineStopped):
            raise error
        self._count += 1
        if self._count <= MAX_RETRIES:
            logger.warning("repeat %d of a call whose replica failed: %s", self._count, error)
        elif is_death:
            raise PoisonRequest(self._count) from error
        else:
            raise error
