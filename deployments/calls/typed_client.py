"""Clients of a deployment whose methods are its Protocol's: each call is written once, with its retry policy.

    class StoreCalls(Protocol):
        @once
        async def gc(self, retention_s: float) -> Collected: ...

The deployment's own class satisfies the Protocol with a method of that name. A client is a subclass of the Protocol
and of `ServeClient`: there the method is the call, so mypy checks both sides.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Generic, TypeVar, cast, overload

from ray.serve.handle import DeploymentHandle
from typing_extensions import is_protocol

from deployments.background import limit_time
from deployments.calls.serve_calls import ServeCalls
from deployments.errors import NoAnswerInTime

WAIT_S = 60.0  # longer than the Store takes to report that its disk does not answer
LONG_WAIT_S = 600.0  # for calls that compute or load: those of a large publish take minutes
Replica = TypeVar("Replica")
Method = TypeVar("Method", bound=Callable[..., Awaitable[Any]])
Function = TypeVar("Function", bound=Callable[..., Any])
Stream = TypeVar("Stream", bound=Callable[..., AsyncGenerator[Any]])


class ServeClient(Generic[Replica]):
    """The calls of one handle, for the methods below and for those that a client writes itself."""

    def __init_subclass__(cls) -> None:
        """Check that each method of the client's Protocols is a call. Python lets an empty one answer None."""
        super().__init_subclass__()
        for protocol in filter(is_protocol, cls.__mro__):
            for name, method in vars(protocol).items():
                is_empty = inspect.isfunction(method) and not hasattr(method, "__wrapped__")
                if is_empty and not name.startswith("_") and getattr(cls, name) is method:
                    remedy = f"put @retry, @once or @stream above it, or write it in {cls.__name__}"
                    raise TypeError(f"{protocol.__name__}.{name} sends nothing: {remedy}")

    def __init__(self, handle: DeploymentHandle) -> None:
        self.calls: ServeCalls[Replica] = ServeCalls(handle)


def once(method: Method) -> Method:
    """Send the call to one replica, once."""
    return _call(method, lambda calls, args: calls.once(method, *args))


@overload
def retry(method: Method) -> Method: ...
@overload
def retry(
    *, only_with: str = "", within_s: float | None = None, late: Callable[[], Exception] = NoAnswerInTime
) -> Callable[[Method], Method]: ...
def retry(
    method: Method | None = None,
    *,
    only_with: str = "",
    within_s: float | None = None,
    late: Callable[[], Exception] = NoAnswerInTime,
) -> Method | Callable[[Method], Method]:
    """Send the call to another replica if one dies: for a read, or a write that is safe to repeat.

    `only_with`: an argument without which the call is sent once, such as the id that makes a write safe to repeat.
    `within_s`: raise `late()` then. Serve lets calls wait for ever while no replica runs.
    """
    if method is None:
        return functools.partial(_retry, only_with=only_with, within_s=within_s, late=late)
    return _retry(method, only_with=only_with, within_s=within_s, late=late)


def _retry(method: Method, *, only_with: str, within_s: float | None, late: Callable[[], Exception]) -> Method:
    names = list(inspect.signature(method).parameters)[1:]

    async def send(calls: ServeCalls[Any], args: tuple[Any, ...]) -> Any:
        is_once = only_with and args[names.index(only_with)] is None
        async with limit_time(asyncio.timeout(within_s), late):
            return await (calls.once(method, *args) if is_once else calls.retry(method, *args))

    return _call(method, send)


def stream(method: Stream) -> Stream:
    """Yield the items of one replica. Closing the generator early cancels the work there."""
    return _call(method, lambda calls, args: calls.stream(method, *args))


def _call(method: Function, send: Callable[[ServeCalls[Any], tuple[Any, ...]], Any]) -> Function:
    """Return the method of a client that sends its arguments, defaults included, by position."""
    signature = inspect.signature(method)
    if any(parameter.kind is parameter.KEYWORD_ONLY for parameter in signature.parameters.values()):
        raise TypeError(f"{method.__name__}: a call between deployments has no keyword-only arguments")

    @functools.wraps(method)
    def call(self: object, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        return send(cast(ServeClient[Any], self).calls, bound.args[1:])

    return cast(Function, call)
