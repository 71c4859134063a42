"""Check where a request comes from: from this machine, and from a page that may use this server.

DNS rebinding: a page of `evil.example` changes the address of its own name to this server's. The browser then sees one
origin and lets the page read every answer, but the request still carries `Host: evil.example`. An IP address in `Host`
is safe: no page can make a browser use a name for it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.config.app import AppConfig
from deployments.errors import HostRefused, OriginRefused
from deployments.http.error_responses import error_response

# Headers that proxies, load balancers and content delivery networks add, in addition to all x-forwarded- headers.
PROXY_HEADERS = frozenset(
    {
        "forwarded",
        "via",
        "x-real-ip",
        "x-client-ip",
        "x-cluster-client-ip",
        "x-original-forwarded-for",
        "x-original-host",
        "x-envoy-external-address",
        "x-envoy-peer-metadata",
        "x-azure-clientip",
        "x-appengine-user-ip",
        "x-arr-log-id",
        "x-proxyuser-ip",
        "true-client-ip",
        "fastly-client-ip",
        "fly-client-ip",
        "cf-connecting-ip",
        "cf-connecting-ipv6",
        "cf-ray",
        "cdn-loop",
        "client-ip",
    }
)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/?#@\[\]\\]+)(?::[0-9]{1,5})?")
_MAX_SHOWN_CHARS = 100


def is_loopback(http: Request) -> bool:
    """Return whether the client is on this machine, and is neither a reverse proxy nor a page of another site.

    A proxy on this machine connects from loopback for any client; it is recognised by the headers that only proxies
    add. A browser lets any page post a form to any address, this machine's included; its `Origin` header says so.
    """
    if any(name in PROXY_HEADERS or name.startswith("x-forwarded-") for name in http.headers):
        return False
    origin = http.headers.get("origin")
    if origin is not None and not _is_local_page(origin):
        return False
    return http.client is not None and is_loopback_address(http.client.host)


def _is_local_page(origin: str) -> bool:
    try:
        host = urlsplit(origin).hostname
    except ValueError:  # as of `http://[evil`
        return False
    return host == "localhost" or (host is not None and is_loopback_address(host))


def is_loopback_address(host: str) -> bool:
    """Return whether `host` is an address of this machine's loopback interface. A name is not."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, for example from a proxy, or a Unix socket
        return False


class HostGuard:
    """ASGI middleware: answer 421 to a `Host` that is not this server's, 403 to a page of another origin.

    With keys neither check is needed: a page cannot send a key that it does not have, nor an `Authorization` header to
    another origin. There the host is checked only if the setting `allowed_hosts` lists any.
    """

    def __init__(self, app: ASGIApp, config: AppConfig) -> None:
        self._app, self._config = app, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                check(Headers(scope=scope), self._config)
            except (HostRefused, OriginRefused) as refusal:
                await error_response(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def check(headers: Headers, config: AppConfig) -> None:
    """Check the headers of a request. Raises: HostRefused, OriginRefused."""
    has_keys = config.has_keys
    if has_keys and not config.allowed_hosts:
        return
    hosts = headers.getlist("host")
    host = host_of(hosts[0]) if len(hosts) == 1 else None
    if host is None or not _is_ours(host, config.allowed_hosts):
        raise HostRefused(", ".join(hosts)[:_MAX_SHOWN_CHARS])
    origin = headers.get("origin")
    if origin is None or has_keys or allows_origin(origin, config):
        return
    if not _is_own_page(origin, host, config.allowed_hosts):
        raise OriginRefused(origin[:_MAX_SHOWN_CHARS])


def allows_origin(origin: str, config: AppConfig) -> bool:
    """Return whether the setting `cors_origins` lists the page's origin."""
    return "*" in config.cors_origins or origin.lower() in config.cors_origins


def host_of(header: str) -> str | None:
    """Return the host of a `Host` header in lower case, without port, brackets and trailing dot; None without one."""
    found = _HOST.fullmatch(header.strip())
    if found is None:
        return None
    host = found[1].strip("[]").lower()
    return host.removesuffix(".") or None


def _is_ours(host: str, allowed: Collection[str]) -> bool:
    return host == "localhost" or host in allowed or _is_address(host)


def _is_own_page(origin: str, host: str, allowed: Collection[str]) -> bool:
    """Return whether the page of this `Origin` is the console, or a page served from this machine."""
    try:
        page = urlsplit(origin).hostname
    except ValueError:  # as of `http://[evil`
        return False
    if page is None:
        return False
    page = page.removesuffix(".")
    return page in ("localhost", host) or page in allowed or is_loopback_address(page)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
