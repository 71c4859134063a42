"""Typed calls over a Serve handle, on which the clients of the three deployments are built.

A call names a method of the deployment's Protocol, as in `calls.retry(StoreReplica.versions, keys)`. So mypy checks
the arguments and the answer of every call, although Ray's handles have no types.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Concatenate, Generic, ParamSpec, TypeVar

from ray.serve.handle import DeploymentHandle

from deployments.calls.retries import retry_on_replica_death
from deployments.calls.transport import over_object_store

P = ParamSpec("P")
T = TypeVar("T")
Replica = TypeVar("Replica")


class ServeCalls(Generic[Replica]):
    """The calls of one handle. `Replica` is the Protocol that each replica of the deployment satisfies."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    def over_object_store(self) -> ServeCalls[Replica]:
        """Return the same calls over Ray's object store."""
        return ServeCalls(over_object_store(self._handle))

    async def once(
        self, method: Callable[Concatenate[Replica, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Return one replica's answer. Raises: RayActorError if that replica dies; the error of the method."""
        answer: T = await getattr(self._handle, method.__name__).remote(*args, **kwargs)
        return answer

    async def retry(
        self, method: Callable[Concatenate[Replica, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Return one replica's answer; ask another replica if that one dies. The call must be safe to repeat.

        Raises: PoisonRequest after the third death; the error of the method.
        """
        return await retry_on_replica_death(lambda: self.once(method, *args, **kwargs))

    async def stream(
        self, method: Callable[Concatenate[Replica, P], AsyncIterator[T]], *args: P.args, **kwargs: P.kwargs
    ) -> AsyncGenerator[T]:
        """Yield the items of one replica. Closing the generator early cancels the work there."""
        response = getattr(self._handle.options(stream=True), method.__name__).remote(*args, **kwargs)
        try:
            async for item in response:
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
        response = self._handle.broadcast(method.__name__, *args, **kwargs)
        answers: list[T | BaseException] = await response.results_async(timeout_s=timeout_s, return_exceptions=True)
        return answers
