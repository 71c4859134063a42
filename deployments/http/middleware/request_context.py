"""One context for every request, an id in every answer, and one report when the answer has ended.

Serve's proxy (2.60) keeps the id a client sends in `x-request-id`, or makes one. It passes the id on in the request's
headers and adds it to the answer. Added here once more, the header would appear twice.
"""

from __future__ import annotations

import asyncio
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.observability.request_context import RequestContext
from deployments.observability.request_metrics import RequestMetrics

_KEY = "context"
_HEADER = "x-request-id"
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # it becomes a part of the answer's id, and of a line in the log
_NOT_MATCHED = "none"
_PROBES = ("/health", "/ready")  # machines send these every few seconds: they are not reported


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
        scope.setdefault("state", {})[_KEY] = context

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


def context_of(scope: Scope) -> RequestContext:
    """Return the context of the request. Raises: KeyError if the middleware above did not see the request."""
    context: RequestContext = scope["state"][_KEY]
    return context


def path_of(scope: Scope) -> str:
    """Return the path as routes match it: relative to where the application is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _id_of(given: str | None) -> str:
    return given if given is not None and _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
