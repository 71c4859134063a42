"""What comes in and goes out of the routes, apart from what they do."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from pydantic import ValidationError
from starlette.types import Scope

from deployments import http_errors
from deployments.answers import JsonObject
from deployments.errors import RequestInvalid
from deployments.request_record import note_refusal
from deployments.schemas import ChatCompletionRequest, CompletionRequest

TextRequest = ChatCompletionRequest | CompletionRequest
# Headers that proxies, load balancers and content delivery networks add, beside all that begin with x-forwarded-.
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


def parse(request: TextRequest | Mapping[str, Any]) -> TextRequest:
    """Raises: RequestInvalid."""
    if not isinstance(request, Mapping):
        return request
    kind = ChatCompletionRequest if "messages" in request else CompletionRequest
    try:
        return kind.model_validate(request)
    except ValidationError as exc:
        raise http_errors.validation_error(exc) from exc


def refuse_stream_options(request: TextRequest) -> None:
    """Of a request that is answered whole. Raises: RequestInvalid."""
    if request.stream_options is not None:
        raise RequestInvalid("stream_options goes with stream: true only", "stream_options")


async def events(opening: JsonObject, chunks: AsyncGenerator[JsonObject]) -> AsyncGenerator[str]:
    """The chunks as server-sent events; an error after the first token is the last event. Leaving closes `chunks`."""
    try:
        async with aclosing(chunks):
            yield f"data: {json.dumps(opening)}\n\n"
            async for chunk in chunks:
                yield f"data: {json.dumps(chunk)}\n\n"
    except Exception as exc:
        _, body = http_errors.describe(exc)
        note_refusal(body["error"]["code"])
        yield f"data: {json.dumps(body)}\n\n"
        return
    yield "data: [DONE]\n\n"


async def json_lines(opening: JsonObject, lines: AsyncGenerator[JsonObject]) -> AsyncGenerator[str]:
    """One JSON object a line; an error after the first one is the last line. Leaving closes `lines`."""
    try:
        async with aclosing(lines):
            yield f"{json.dumps(opening)}\n"
            async for line in lines:
                yield f"{json.dumps(line)}\n"
    except Exception as exc:
        _, body = http_errors.describe(exc)
        note_refusal(body["error"]["code"])
        yield f"{json.dumps(body)}\n"


def path_of(scope: Scope) -> str:
    """The path as routes are matched: below where the application is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


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
    """Return whether `host` is an address of this machine's loopback interface. A name is none."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name; of a client, a Unix socket or a proxy that gives one
        return False
