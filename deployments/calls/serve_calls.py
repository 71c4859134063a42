"""Typed calls over Serve handles: retries and transport.

A call names a method of the deployment's Protocol, as in `calls.retry(StoreReplica.versions, keys)`. So mypy checks
the arguments and the answer of every call, although Ray's handles have no types.

Only the Ingress repeats calls. In Ray 2.60 a replica's death shows as one of three errors. ActorDiedError and
ActorUnavailableError, both RayActorErrors: the process or the connection to it is gone. ObjectLostError: the answer was
lost with its node. An error that the replica raised itself arrives as a RayTaskError and is an answer, even if it
reports another actor's death. Serve itself sends a call that a dead replica had not accepted to another replica; that
does not count here.

Serve 2.60 has two transports: Ray's tasks, and gRPC from replica to replica. The environment of a process decides the
default, so each call names its own transport: Ray's tasks here, which carry large arguments and answers in the object
store, and references, which gRPC would never free.

Serve logs every error that a replica raises, with its traceback. An answer to a wrong request is not a failure of
the replica, so `returning_refusals` makes the replica return it, and the caller raises it.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Concatenate, Generic, ParamSpec, TypeVar

from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.handle import DeploymentHandle

from deployments.api import error_table
from deployments.errors import PoisonRequest
from gpu_worker.errors import EngineStopped

logger = logging.getLogger(__name__)
T = TypeVar("T")
MAX_RETRIES = 2  # after the first attempt, for calls and for generation
P = ParamSpec("P")
Replica = TypeVar("Replica")


async def retry_on_replica_death(call: Callable[[], Awaitable[T]]) -> T:
    """Return the answer of `call`. It may run up to 1 + MAX_RETRIES times, so it must be safe to repeat.

    Raises: PoisonRequest if a replica dies at the last attempt; the error of `call`.
    """
    failures = AttemptCounter()
    while True:
        try:
            return await call()
        except Exception as exc:
            failures.raise_unless_repeatable(exc)


class AttemptCounter:
    """Counts the failed attempts of one call, and decides whether it may be repeated."""

    def __init__(self) -> None:
        self._count = 0

    def raise_unless_repeatable(self, error: Exception) -> None:
        """Count a failed attempt. Return if the call may be repeated.

        Raises: PoisonRequest if a replica died at the last attempt; `error` if it is the call's own, or an engine
        stopped at the last attempt.
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


def bypass_http_proxy() -> None:
    """Keep gRPC connections of this process and its children away from the proxy that `http_proxy` names.

    Python's gRPC would use that proxy, Ray's own does not. gRPC reads `grpc_proxy` first, even if it is empty.
    """
    os.environ.setdefault("grpc_proxy", "")


def returning_refusals(deployment: type[Replica], protocol: type) -> type[Replica]:
    """Return the deployment with calls that return refusals as values. `protocol` names these calls."""
    calls = {name: getattr(deployment, name) for name in dir(protocol) if not name.startswith("_")}
    wrapped = {
        name: _returning_stream(call) if inspect.isasyncgenfunction(call) else _returning(call)
        for name, call in calls.items()
    }
    return type(deployment.__name__, (deployment,), wrapped)


def _returning(call: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[object]]:
    @functools.wraps(call)
    async def answer(*args: object, **kwargs: object) -> object:
        try:
            return await call(*args, **kwargs)
        except Exception as exc:
            if not error_table.is_refusal(exc):
                raise
            return exc

    return answer


def _returning_stream(call: Callable[..., AsyncGenerator[object]]) -> Callable[..., AsyncGenerator[object]]:
    @functools.wraps(call)
    async def answer(*args: object, **kwargs: object) -> AsyncGenerator[object]:
        async with aclosing(call(*args, **kwargs)) as items:
            try:
                async for item in items:
                    yield item
            except Exception as exc:
                if not error_table.is_refusal(exc):
                    raise
                yield exc

    return answer


class ServeCalls(Generic[Replica]):
    """The calls of one handle. `Replica` is the Protocol that each replica of the deployment satisfies."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def once(
        self, method: Callable[Concatenate[Replica, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Return one replica's answer. Raises: RayActorError if that replica dies; the error of the method."""
        handle = self._handle.options(method_name=method.__name__, _by_reference=True)
        answer: T = await handle.remote(*args, **kwargs)
        if isinstance(answer, Exception):  # a refusal, which the replica returned
            raise answer
        return answer

    async def retry(
        self, method: Callable[Concatenate[Replica, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Return one replica's answer; ask another replica if that one dies. The call must be safe to repeat.

        Raises: PoisonRequest if a replica dies at the last attempt; the error of the method.
        """
        return await retry_on_replica_death(lambda: self.once(method, *args, **kwargs))

    async def stream(
        self, method: Callable[Concatenate[Replica, P], AsyncIterator[T]], *args: P.args, **kwargs: P.kwargs
    ) -> AsyncGenerator[T]:
        """Yield the items of one replica. Closing the generator early cancels the work there."""
        handle = self._handle.options(method_name=method.__name__, stream=True, _by_reference=True)
        response = handle.remote(*args, **kwargs)
        try:
            async for item in response:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            response.cancel()

    async def broadcast(
        self,
        timeout_s: float,
        method: Callable[Concatenate[Replica, P], Awaitable[T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> list[T | BaseException]:
        """Return the answer or error of every replica.

        Raises: DeploymentUnavailableError if no replica runs; TimeoutError if one does not answer in time.
        """
        response = self._handle.options(_by_reference=True).broadcast(method.__name__, *args, **kwargs)
        answers: list[T | BaseException] = await response.results_async(timeout_s=timeout_s, return_exceptions=True)
        return answers
