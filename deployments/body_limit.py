"""Refuses bodies larger than the server reads, before they are in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import BodyTooLarge
from deployments.http_errors import error_response

DEFAULT_MAX_BODY_BYTES = 4 << 20


class BodyLimit:
    """ASGI middleware: a request whose body passes what `limit_of` allows it is answered 413."""

    def __init__(self, app: ASGIApp, limit_of: Callable[[Scope], int]) -> None:
        self._app, self._limit_of = app, limit_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        max_bytes = self._limit_of(scope)
        refusal = BodyTooLarge(f"the body is larger than {max_bytes} bytes")
        seen, started = 0, False

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > max_bytes:
                raise refusal
            return message

        async def answer(message: Message) -> None:
            nonlocal started
            if started or seen <= max_bytes:  # FastAPI answers 400 to whatever breaks its reading
                started = True
                await send(message)

        with contextlib.suppress(BodyTooLarge):
            await self._app(scope, bounded, answer)
        if seen > max_bytes and not started:
            await error_response(refusal)(scope, receive, send)
