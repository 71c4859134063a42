"""Replacements for Ray Serve's handles, in this process and without a cluster."""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections.abc import AsyncIterator, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from gpu_worker.errors import EngineFull, EngineStopped, PromptTooLong, RequestFailed
from lora_store import AdapterNotFound

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Call:
    """One call through a handle. Numbers increase over all handles, so they give the order of the calls."""

    name: str
    args: tuple[Any, ...]
    by_reference: bool | None = field(default=None, compare=False)  # the requested transport
    number: int = field(default_factory=lambda: next(_numbers), compare=False)


@dataclass(eq=False)
class FakeResponse:
    """An awaitable or, for a streaming call, an async iterator over the result of the target's method."""

    answer: Any
    num_cancels: int = 0
    closing: asyncio.Future[None] | None = None

    def __await__(self) -> Generator[Any, None, Any]:
        return self._result().__await__()

    async def _result(self) -> Any:
        try:
            return await self.answer
        except Exception as exc:
            raise as_ray_raises(exc) from exc

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            async for item in self.answer:
                yield item
        except Exception as exc:
            raise as_ray_raises(exc) from exc

    def cancel(self) -> None:
        """End a stream that waits for its reader, as Ray does. One that computes ends with the task that reads it."""
        self.num_cancels += 1
        if inspect.isasyncgen(self.answer) and not self.answer.ag_running:
            self.closing = asyncio.ensure_future(self.answer.aclose())


@dataclass
class FakeBroadcast:
    """The answer of each replica. A silent replica makes the broadcast time out; without replicas it fails.

    Ray 2.60 behaves in the same way.
    """

    answers: Sequence[Any]
    num_silent: int
    timeouts_s: list[float | None]

    async def results_async(self, *, timeout_s: float | None = None, return_exceptions: bool = False) -> list[Any]:
        self.timeouts_s.append(timeout_s)
        if not self.answers:
            raise DeploymentUnavailableError(DeploymentID("Fake", "app"))
        responses = [FakeResponse(answer) for answer in self.answers]
        results = await asyncio.gather(*responses, return_exceptions=return_exceptions)
        if self.num_silent:
            assert timeout_s is not None, "this broadcast would never end"
            raise TimeoutError("Timed out waiting for broadcast results.")
        return results


class FakeHandle:
    """A DeploymentHandle over plain objects: `remote` calls the first replica, `broadcast` calls all."""

    app_name, deployment_name = "app", "Worker"

    def __init__(self, *replicas: object, num_silent: int = 0) -> None:
        self.calls: list[Call] = []
        self.responses: list[FakeResponse] = []
        self.timeouts_s: list[float | None] = []
        self.replicas, self._num_silent = replicas, num_silent

    def __getattr__(self, name: str) -> FakeMethod:
        if name.startswith("_"):
            raise AttributeError(name)
        return FakeMethod(self, name)

    def options(
        self, *, method_name: str = "__call__", stream: bool = False, _by_reference: bool | None = None
    ) -> FakeMethod:
        return FakeMethod(self, method_name, stream, _by_reference)

    def call(self, name: str, args: tuple[Any, ...], *, stream: bool, by_reference: bool | None) -> FakeResponse:
        self.calls.append(Call(name, args, by_reference))
        answer = getattr(self.replicas[0], name)(*args)
        assert hasattr(answer, "__aiter__") == stream, f"{name} and stream={stream} do not go together"
        self.responses.append(FakeResponse(answer))
        return self.responses[-1]

    def broadcast(self, name: str, args: tuple[Any, ...], *, by_reference: bool | None) -> FakeBroadcast:
        self.calls.append(Call(name, args, by_reference))
        answers = [getattr(replica, name)(*args) for replica in self.replicas]
        return FakeBroadcast(answers, self._num_silent, self.timeouts_s)

    def called(self, name: str) -> list[tuple[Any, ...]]:
        """Return the arguments of every call of `name`, in order."""
        return [call.args for call in self.calls if call.name == name]


@dataclass(frozen=True, slots=True)
class FakeMethod:
    """`handle.name`, and `handle.options(…)`."""

    handle: FakeHandle
    name: str
    stream: bool = False
    by_reference: bool | None = None

    def remote(self, *args: Any) -> FakeResponse:
        return self.handle.call(self.name, args, stream=self.stream, by_reference=self.by_reference)

    def broadcast(self, name: str, *args: Any) -> FakeBroadcast:
        return self.handle.broadcast(name, args, by_reference=self.by_reference)


def as_ray_raises(error: Exception) -> Exception:
    """Return the exception that a caller sees: an error of a replica becomes a RayTaskError, Ray's errors stay."""
    if isinstance(error, RayError | RayServeException):
        return error
    text = f"Traceback (most recent call last):\n  a replica's inside\n{error!r}"
    wrapped: Exception = RayTaskError("method", text, error, "replica", 1, "127.0.0.1").as_instanceof_cause()
    return wrapped


# A call that ends by one of FAILURES is sent again, and by one of ANSWERS it is not.
DEATHS = [ActorDiedError(), ActorUnavailableError("gone", None), ObjectLostError("0" * 56, None, "")]
FAILURES = [*DEATHS, EngineStopped("the engine has stopped")]
ANSWERS = [
    PromptTooLong("long"),
    RequestFailed("r-1"),
    EngineFull("full"),
    AdapterNotFound("x"),
    BackPressureError(2, 1),
    DeploymentUnavailableError(DeploymentID("Worker", "app")),
    TimeoutError("its own"),
    as_ray_raises(RuntimeError("a replica's own")),
    RayTaskError("read", "Traceback", ActorDiedError(), "replica", 1, "127.0.0.1").as_instanceof_cause(),
]
