"""An Ingress replica counts the requests it works on, and refuses at once what comes above its limit."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.errors import ServerOverloaded
from deployments.http_errors import error_response
from deployments.http_io import path_of
from deployments.request_time import mark_arrival

_ALWAYS_ANSWERED = ("/health", "/ready")


class InFlight:
    """How many requests this replica works on, each until the last byte of its answer."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.count = 0

    def enter(self) -> None:
        """Raises: ServerOverloaded."""
        if self.count >= self._limit:
            raise ServerOverloaded(self._limit)
        self.count += 1

    def leave(self) -> None:
        self.count -= 1


class InFlightLimit:
    """ASGI middleware, the outermost: of what it refuses not even the body is read."""

    def __init__(self, app: ASGIApp, in_flight: Callable[[], InFlight]) -> None:
        self._app, self._in_flight = app, in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope) in _ALWAYS_ANSWERED:
            await self._app(scope, receive, send)
            return
        mark_arrival()
        in_flight = self._in_flight()
        try:
            in_flight.enter()
        except ServerOverloaded as refusal:
            await error_response(refusal)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            in_flight.leave()
