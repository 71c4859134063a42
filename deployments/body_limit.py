"""Refuses bodies larger or slower than the server reads, before they are in memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import BodyTooLarge, BodyTooSlow
from deployments.http_errors import error_response

DEFAULT_MAX_BODY_BYTES = 4 << 20
_PATIENCE_S = 30.0
_SLOWEST_BYTES_PER_S = 1 << 20


class BodyLimit:
    """ASGI middleware: a request whose body passes what `limit_of` allows it is answered 413.

    One that has not come whole after `patience_s` and a second for each MiB it may have is answered 408: bodies that
    trickle would hold their places for ever.
    """

    def __init__(self, app: ASGIApp, limit_of: Callable[[Scope], int], patience_s: float = _PATIENCE_S) -> None:
        self._app, self._limit_of, self._patience_s = app, limit_of, patience_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive, self._limit_of(scope), self._patience_s)
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if started or body.refusal is None:  # FastAPI answers 400 to whatever breaks its reading
                started = True
                await send(message)

        with contextlib.suppress(BodyTooLarge, BodyTooSlow):
            await self._app(scope, body.read, answer)
        if body.refusal is not None and not started:
            await error_response(body.refusal)(scope, receive, send)


class _Body:
    """The messages of one request, as long as its body keeps within the bounds."""

    def __init__(self, receive: Receive, max_bytes: int, patience_s: float) -> None:
        self._receive, self._max_bytes = receive, max_bytes
        self._seconds = patience_s + max_bytes / _SLOWEST_BYTES_PER_S
        self._until: float | None = asyncio.get_running_loop().time() + self._seconds  # None: it is read
        self._seen = 0
        self.refusal: BodyTooLarge | BodyTooSlow | None = None

    async def read(self) -> Message:
        """Raises: BodyTooLarge, BodyTooSlow."""
        try:
            async with asyncio.timeout_at(self._until) as limit:
                message = await self._receive()
        except TimeoutError as exc:
            if not limit.expired():
                raise
            raise self._refuse(BodyTooSlow(f"the body did not come within {self._seconds:.0f} s")) from exc
        self._seen += len(message.get("body", b""))
        if self._seen > self._max_bytes:
            raise self._refuse(BodyTooLarge(f"the body is larger than {self._max_bytes} bytes"))
        if not message.get("more_body", False):
            self._until = None  # what is waited for now is that the client leaves
        return message

    def _refuse(self, refusal: BodyTooLarge | BodyTooSlow) -> BodyTooLarge | BodyTooSlow:
        self.refusal = refusal
        return refusal
