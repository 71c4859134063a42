"""Decide whether a request comes from this machine."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from fastapi import Request

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
    except ValueError:  # a name; of a client, a Unix socket or a proxy that gives one
        return False
