"""Refuses bodies larger than the server reads, before they are in memory."""

from __future__ import annotations

import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import BodyTooLarge
from deployments.http_errors import error_response

DEFAULT_MAX_BODY_BYTES = 4 << 20


class BodyLimit:
    """ASGI middleware: a request whose body passes `max_bytes` is answered 413."""

    def __init__(self, app: ASGIApp, max_bytes: int = DEFAULT_MAX_BODY_BYTES) -> None:
        self._app, self._max_bytes = app, max_bytes

    @property
    def _refusal(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is larger than {self._max_bytes} bytes")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen, started = 0, False

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_bytes:
                raise self._refusal
            return message

        async def answer(message: Message) -> None:
            nonlocal started
            if started or seen <= self._max_bytes:  # FastAPI answers 400 to whatever breaks its reading
                started = True
                await send(message)

        with contextlib.suppress(BodyTooLarge):
            await self._app(scope, bounded, answer)
        if seen > self._max_bytes and not started:
            await error_response(self._refusal)(scope, receive, send)
