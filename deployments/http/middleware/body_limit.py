"""Refuse bodies that are too large or too slow, or that exceed the memory shared by all bodies, while they are read."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import BodyMemoryFull, BodyNotAllowed, BodyTooLarge, BodyTooSlow
from deployments.http.error_responses import error_response
from deployments.http.json_body import KEEP_OF_BODY
from deployments.http.middleware.concurrency_limit import tenant_of
from deployments.http.shared_bytes import SharedBytes

DEFAULT_MAX_BODY_BYTES = 4 << 20
_PATIENCE_S = 30.0
_SLOWEST_BYTES_PER_S = 1 << 20
_WITH_BODY = ("POST", "PUT", "PATCH")

Refusal = BodyMemoryFull | BodyTooLarge | BodyTooSlow


class BodyLimit:
    """ASGI middleware: bound the size, the duration and the memory of request bodies.

    - 413: the body is larger than `limit_of` allows for this request.
    - 408: the body is incomplete after `patience_s` plus one second for each MiB it may have. A slow body would
      otherwise hold its place for ever.
    - 503: the budget has no room. A body counts there until it is parsed; its parsed texts count until the answer ends.
      Uploads may be larger than other bodies and have their own budget.
    - 400: the method takes no body. No route would read it, and Serve's proxy and the replica would keep all of it in
      memory until the answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        limit_of: Callable[[Scope], int],
        budget: SharedBytes,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self._app, self._limit_of, self._budget, self._patience_s = app, limit_of, budget, patience_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope.get("method", "POST") not in _WITH_BODY and _announces_body(scope):
            refusal = BodyNotAllowed(f"{scope['method']} takes no body: send it without one")
            await error_response(refusal)(scope, receive, send)
            return
        max_bytes = self._limit_of(scope)
        budget = self._budget if max_bytes <= DEFAULT_MAX_BODY_BYTES else SharedBytes(max_bytes)
        body = _Body(receive, max_bytes, budget, tenant_of(scope), self._patience_s)
        scope.setdefault("state", {})[KEEP_OF_BODY] = body.keep
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if started or body.refusal is None:  # FastAPI answers 400 to whatever breaks its reading
                started = True
                await send(message)

        try:
            with contextlib.suppress(BodyMemoryFull, BodyTooLarge, BodyTooSlow):
                await self._app(scope, body.read, answer)
        finally:
            body.keep(0)
        if body.refusal is not None and not started:
            await error_response(body.refusal)(scope, receive, send)


def _announces_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or any(length.strip() != "0" for length in headers.getlist("content-length"))


class _Body:
    """Reads the messages of one request, as long as its body stays within the bounds."""

    def __init__(self, receive: Receive, max_bytes: int, budget: SharedBytes, tenant: str, patience_s: float) -> None:
        self._receive, self._max_bytes, self._budget, self._tenant = receive, max_bytes, budget, tenant
        self._seconds = patience_s + max_bytes / _SLOWEST_BYTES_PER_S
        self._until: float | None = asyncio.get_running_loop().time() + self._seconds  # None: the body is complete
        self._seen = self._held = 0
        self.refusal: Refusal | None = None

    async def read(self) -> Message:
        """Raises: BodyMemoryFull, BodyTooLarge, BodyTooSlow."""
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
        self._hold(len(message.get("body", b"")))
        if not message.get("more_body", False):
            self._until = None  # the next message says that the client disconnected
        return message

    def keep(self, num_bytes: int) -> None:
        """Release all held bytes except `num_bytes`."""
        num_bytes = min(num_bytes, self._held)
        self._budget.give(self._tenant, self._held - num_bytes)
        self._held = num_bytes

    def _hold(self, num_bytes: int) -> None:
        if not self._budget.take(self._tenant, num_bytes):
            raise self._refuse(BodyMemoryFull(self._budget.max_bytes))
        self._held += num_bytes

    def _refuse(self, refusal: Refusal) -> Refusal:
        self.refusal = refusal
        return refusal
