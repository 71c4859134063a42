"""Repeat calls whose replica died. Only the Ingress repeats calls.

In Ray 2.60 a replica's death shows as one of three errors. ActorDiedError and ActorUnavailableError, both
RayActorErrors: the process or the connection to it is gone. ObjectLostError: the answer was lost with its node. An
error that the replica raised itself arrives as a RayTaskError and is an answer, even if it reports another actor's
death. Serve itself sends a call that a dead replica had not accepted to another replica; that does not count here.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from deployments.errors import PoisonRequest
from gpu_worker.errors import EngineStopped

logger = logging.getLogger(__name__)

T = TypeVar("T")
MAX_RETRIES = 2


async def retry_on_replica_death(call: Callable[[], Awaitable[T]]) -> T:
    """Return the answer of `call`, which may run twice: a read, or a write that has the same effect when repeated.

    Raises: PoisonRequest after the third death; the error of `call`.
    """
    failures = AttemptCounter()
    while True:
        try:
            return await call()
        except Exception as exc:
            failures.add(exc)


class AttemptCounter:
    """Counts the failed attempts of one call, and decides whether it may be repeated."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, error: Exception) -> None:
        """Count a failed attempt. Return if the call may be repeated.

        Raises: PoisonRequest at the third death; `error` if it is the call's own, or the third failure of an engine.
        """
        is_death = isinstance(error, RayActorError | ObjectLostError) and not isinstance(error, RayTaskError)
        if not is_death and not isinstance(error, EngineStopped):
            raise error
        self._count += 1
        if self._count <= MAX_RETRIES:
            logger.warning("retry %d of a call whose replica failed: %s", self._count, error)
        elif is_death:
            raise PoisonRequest(self._count) from error
        else:
            raise error
