"""Middleware that every request passes, except those that read bodies and hosts.

Serve's proxy (2.60) keeps the id a client sends in `x-request-id`, or makes one. It passes the id on in the request's
headers and adds it to the answer. Added here once more, the header would appear twice.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.auth.authenticator import ANONYMOUS_TENANT, Authenticator
from deployments.errors import ServerOverloaded
from deployments.http.error_responses import error_response
from deployments.observability.request_metrics import CONTEXT_KEY, RequestContext, RequestMetrics, context_of, path_of

_HEADER = "x-request-id"
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # it becomes part of the answer's id and of a log line
_NOT_MATCHED = "none"
_PROBES = ("/health", "/ready")  # probes: always answered, never reported
_NOT_KEPT = ("application/json", "application/x-ndjson", "text/event-stream", "text/plain")
_GUARDED = "/v1/"  # the other routes show nothing of the pool: health, the description of the API, the console's page
WAITS_S = 10.0  # a refused client retries after a second or more


class RequestContextMiddleware:
    """ASGI middleware: create the request's context, and report it when the last byte of the answer is sent.

    It must be the outermost, so that the refusals of all others carry an id and are reported. A client's id is kept if
    it is short and plain; otherwise the request gets a new one.
    """

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(_HEADER)
        context = RequestContext(_id_of(given), _NOT_MATCHED, scope["method"])
        scope.setdefault("state", {})[CONTEXT_KEY] = context

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                if given is None:
                    MutableHeaders(scope=message)[_HEADER] = context.request_id
            await send(message)

        try:
            await self._app(scope, receive, answer)
        except asyncio.CancelledError:
            raise
        except Exception:
            context.status, context.code = 500, "internal_error"
            raise
        finally:
            if path_of(scope) not in _PROBES:
                context.route = getattr(scope.get("route"), "path", _NOT_MATCHED)
                self._metrics.record_request(context)


def _id_of(given: str | None) -> str:
    return given if given is not None and _SAFE_ID.fullmatch(given) else uuid.uuid4().hex


class SafeHeaders:
    """ASGI middleware: forbid browsers to guess the type of an answer, and caches to store answers of the API.

    Answers contain texts of prompts and data that only one key may see: neither a shared cache nor a browser may store
    them. Files of the console set their own cache headers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                if headers.get("content-type", "").startswith(_NOT_KEPT):
                    headers["Cache-Control"] = "no-store"
            await send(message)

        await self._app(scope, receive, answer if scope["type"] == "http" else send)


class BearerAuth:
    """ASGI middleware: answer 401 to any request below /v1 without a valid key, before its body is read.

    The caller goes into the request's context. A route that a request reaches in another way finds no caller there
    and answers 401 itself.
    """

    def __init__(self, app: ASGIApp, authenticator: Authenticator) -> None:
        self._app, self._authenticator = app, authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and path_of(scope).startswith(_GUARDED):
            context = context_of(scope)
            try:
                context.caller = self._authenticator.authenticate(Headers(scope=scope).get("authorization"))
            except Exception as exc:
                await error_response(exc)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class InFlight:
    """Counts the requests of one replica, each until the last byte of its answer.

    A tenant that is alone may use every place. A tenant's share is the limit divided by the number of tenants that run
    requests or were refused. A tenant that was refused below its share waits: for `WAITS_S`, tenants at or above their
    share are refused, so that a free place is left when it retries.

    Requests without a caller take places too, but the anonymous tenant has no share: it never waits, makes no other
    share smaller, and is refused while any tenant waits.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit, clock
        self._counts: Counter[str] = Counter()
        self._waits_until: dict[str, float] = {}
        self.count = 0

    def enter(self, tenant: str) -> None:
        """Raises: ServerOverloaded."""
        now = self._clock()
        self._waits_until = {other: until for other, until in self._waits_until.items() if until > now}
        has_share = tenant == ANONYMOUS_TENANT or self._counts[tenant] >= self._share_with(tenant)
        if self.count >= self._limit:
            if not has_share:
                self._waits_until[tenant] = now + WAITS_S
            raise ServerOverloaded(self._limit)
        if has_share and any(other != tenant for other in self._waits_until):
            raise ServerOverloaded(self._limit)
        self._waits_until.pop(tenant, None)
        self._counts[tenant] += 1
        self.count += 1

    def leave(self, tenant: str) -> None:
        self._counts[tenant] -= 1
        if not self._counts[tenant]:
            del self._counts[tenant]
        self.count -= 1

    def _share_with(self, tenant: str) -> int:
        here = {other for other, count in self._counts.items() if count} | self._waits_until.keys() | {tenant}
        return max(1, self._limit // len(here - {ANONYMOUS_TENANT}))


class ConcurrencyLimit:
    """ASGI middleware: refuse requests above the limit before their body is read. Probes are always answered."""

    def __init__(self, app: ASGIApp, in_flight: InFlight) -> None:
        self._app, self._in_flight = app, in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope) in _PROBES:
            await self._app(scope, receive, send)
            return
        tenant = tenant_of(scope)
        try:
            self._in_flight.enter(tenant)
        except ServerOverloaded as refusal:
            await error_response(refusal)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight.leave(tenant)


def tenant_of(scope: Scope) -> str:
    """Return the caller's tenant; the anonymous one on routes that need no key."""
    caller = context_of(scope).caller
    return ANONYMOUS_TENANT if caller is None else caller.tenant
