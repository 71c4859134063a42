"""Middleware that every request passes before its body is read: its context, its origin, its caller, and its place.

Serve's proxy (2.60) keeps the id a client sends in `x-request-id`, or makes one. It passes the id on in the request's
headers and adds it to the answer. Added here once more, the header would appear twice. `ProxyDuties` adds it likewise.
`TrustedHeaders` removes ids that are not plain before either.

DNS rebinding: a page of `evil.example` changes the address of its own name to this server's. The browser then sees one
origin and lets the page read every answer, but the request still carries `Host: evil.example`. An IP address in `Host`
is safe: no page can make a browser use a name for it.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Collection
from contextlib import ExitStack
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.addresses import is_loopback_host, parse_address
from deployments.auth.authenticator import Authenticator, InFlight
from deployments.calls.h11_proxy import ID_HEADER, is_plain_id
from deployments.config.app import AppConfig
from deployments.errors import HostRefused, OriginRefused
from deployments.http.dependencies import find_page_host
from deployments.http.error_responses import error_response
from deployments.http.scope import CONTEXT_KEY, find_context, find_path
from deployments.observability.request_context import CLIENT_LEFT, RequestContext
from deployments.observability.request_metrics import RequestMetrics
from deployments.observability.usage import UsageLog

_NOT_MATCHED = "none"
_MAX_LISTED = 16  # ignored fields in the header
_PROBES = ("/health", "/ready")  # probes: always answered, never reported
_NOT_KEPT = (
    *("application/json", "application/x-ndjson", "text/event-stream", "text/plain"),
    *("application/vnd.apache.parquet", "application/octet-stream"),  # a copy of the pool
)
# The other routes show nothing of the pool: health, the description of the API, the console's page.
_GUARDED = ("/v1/", "/tokenize", "/detokenize")
_UNCOUNTED = "/v1/models"  # clients and load balancers poll it; the route counts searches and further pages
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/?#@\[\]\\]+)(?::[0-9]{1,5})?")
_MAX_SHOWN_CHARS = 100


class RequestContextMiddleware:
    """ASGI middleware: create the request's context, and report it when the last byte of the answer is sent.

    It must be the outermost, so that the refusals of all others carry an id and are reported. A client's id is kept if
    it is short and plain; otherwise the request gets a new one. The usage of the request is recorded before the last
    byte is sent.

    Answers to a key with rates say what is left of them.

    Answers contain texts of prompts and data that only one key may see: neither a shared cache nor a browser may store
    them, and browsers may not guess their type. Files of the console set their own cache headers.
    """

    def __init__(
        self, app: ASGIApp, authenticator: Authenticator, metrics: RequestMetrics, usage_log: UsageLog
    ) -> None:
        self._app, self._authenticator, self._metrics, self._usage_log = app, authenticator, metrics, usage_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(ID_HEADER)
        request_id = given if given is not None and is_plain_id(given) else uuid.uuid4().hex
        context = RequestContext(request_id, _NOT_MATCHED, scope["method"])
        scope.setdefault("state", {})[CONTEXT_KEY] = context
        is_complete = False

        async def answer(message: Message) -> None:
            nonlocal is_complete
            if message["type"] == "http.response.start":
                context.route = getattr(scope.get("route"), "path", _NOT_MATCHED)
                context.status, headers = message["status"], MutableHeaders(scope=message)
                if given != request_id:
                    headers[ID_HEADER] = request_id
                if find_path(scope).startswith("/v1/messages"):
                    headers["request-id"] = request_id  # where Anthropic's clients look for it
                headers["X-Content-Type-Options"] = "nosniff"
                if headers.get("content-type", "").startswith(_NOT_KEPT):
                    headers["Cache-Control"] = "no-store"
                if context.caller is not None:
                    headers.update(self._authenticator.rate_headers(context.caller))
                if context.ignored_header:
                    headers["x-ignored-headers"] = context.ignored_header
                if context.ignored:
                    names = [quote(name, safe="[]") for name in context.ignored[:_MAX_LISTED]]
                    more = ["..."] if len(context.ignored) > _MAX_LISTED else []
                    headers["x-ignored-fields"] = ", ".join(names + more)
            elif not message.get("more_body", False):
                is_complete = True
                self._usage_log.record(context)
            await send(message)

        try:
            await self._app(scope, receive, answer)
        except asyncio.CancelledError:
            raise
        except Exception:
            context.status, context.code = 500, "internal_error"
            raise
        finally:
            if find_path(scope) not in _PROBES:
                context.route = getattr(scope.get("route"), "path", _NOT_MATCHED)
                if not (is_complete or context.code or context.is_recorded):
                    context.status = CLIENT_LEFT
                self._usage_log.record(context)
                self._metrics.record_request(context)


class Admission:
    """ASGI middleware: refuse a request before its body is read, or take a place for it until its last byte.

    - 421, 403: its `Host` is not this server's, or it comes from a page of another origin; see `check_origin`.
    - 401: its path is below /v1, and it has no valid key. The caller goes into the request's context. A route that a
      request reaches in another way finds no caller there and answers 401 itself.
    - 429: the key is above its rate, or the server or the caller's tenant has no place left. Probes are always answered
      and need none.
    """

    def __init__(self, app: ASGIApp, config: AppConfig, authenticator: Authenticator, in_flight: InFlight) -> None:
        self._app, self._config, self._authenticator, self._in_flight = app, config, authenticator, in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with ExitStack() as held:
            try:
                self._admit(scope, held)
            except Exception as refusal:
                await error_response(refusal)(scope, receive, send)
                return
            await self._app(scope, receive, send)

    def _admit(self, scope: Scope, held: ExitStack) -> None:
        """Check the request, and take a place for it, which `held` keeps. Raises: the refusal."""
        headers = Headers(scope=scope)
        check_origin(headers, self._config)  # before a key is read
        context, path = find_context(scope), find_path(scope)
        if path.startswith(_GUARDED):
            # Anthropic's clients send `x-api-key`. A proxy's own `Authorization: Basic` may stand beside it.
            is_bearer = headers.get("authorization", "").lower().startswith("bearer ")
            header = "x-api-key" if "x-api-key" in headers and not is_bearer else "authorization"
            sent = headers.get(header)
            if sent is not None and not self._config.has_keys:
                context.ignored_header = header
            authorization = f"Bearer {sent}" if sent is not None and header == "x-api-key" else sent
            context.caller = self._authenticator.authenticate(authorization)
            context.tenant = context.caller.tenant
            if not (context.method == "GET" and path.startswith(_UNCOUNTED)):
                self._authenticator.count_request(context.caller)
        if path not in _PROBES:
            held.enter_context(self._in_flight.place(context.tenant))


def check_origin(headers: Headers, config: AppConfig) -> None:
    """Check that `Host` is this server's, and the page one that may use it. Raises: HostRefused, OriginRefused.

    With keys neither check is needed: a page cannot send a key that it does not have, nor an `Authorization` header to
    another origin. There the host is checked only if the setting `allowed_hosts` lists any.
    """
    has_keys = config.has_keys
    if has_keys and not config.allowed_hosts:
        return
    hosts = headers.getlist("host")
    host = parse_host(hosts[0]) if len(hosts) == 1 else None
    if host is None or not (host == "localhost" or host in config.allowed_hosts or parse_address(host) is not None):
        raise HostRefused(", ".join(hosts)[:_MAX_SHOWN_CHARS])
    origin = headers.get("origin")
    if origin is None or has_keys or "*" in config.cors_origins or origin.lower() in config.cors_origins:
        return
    if not _is_own_page(origin, host, config.allowed_hosts):
        raise OriginRefused(origin[:_MAX_SHOWN_CHARS])


def parse_host(header: str) -> str | None:
    """Return the host of a `Host` header in lower case, without port, brackets and trailing dot; None without one."""
    found = _HOST.fullmatch(header.strip())
    if found is None:
        return None
    host = found[1].strip("[]").lower()
    return host.removesuffix(".") or None


def _is_own_page(origin: str, host: str, allowed: Collection[str]) -> bool:
    """Return whether the page of this `Origin` is the console, or a page served from this machine."""
    page = (find_page_host(origin) or "").removesuffix(".")
    return page == host or page in allowed or is_loopback_host(page)
