"""Refuses bodies larger than the server reads, before they are in memory."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import BodyTooLarge
from deployments.http_errors import error_response

DEFAULT_MAX_BODY_BYTES = 4 << 20


class BodyLimit:
    """ASGI middleware: a request whose body passes `max_bytes` is answered 413."""

    def __init__(self, app: ASGIApp, max_bytes: int = DEFAULT_MAX_BODY_BYTES) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_bytes:
                raise BodyTooLarge(f"the body is larger than {self._max_bytes} bytes")
            return message

        try:
            await self._app(scope, bounded, send)
        except BodyTooLarge as exc:
            await error_response(exc)(scope, receive, send)
