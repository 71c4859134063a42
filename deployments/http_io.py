"""What comes in and goes out of the routes, apart from what they do."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

from fastapi import Request
from pydantic import ValidationError

from deployments import http_errors
from deployments.answers import JsonObject
from deployments.schemas import ChatCompletionRequest, CompletionRequest

TextRequest = ChatCompletionRequest | CompletionRequest


def parse(request: TextRequest | Mapping[str, Any]) -> TextRequest:
    """Raises: RequestInvalid."""
    if not isinstance(request, Mapping):
        return request
    kind = ChatCompletionRequest if "messages" in request else CompletionRequest
    try:
        return kind.model_validate(request)
    except ValidationError as exc:
        raise http_errors.validation_error(exc) from exc


async def events(opening: JsonObject, chunks: AsyncGenerator[JsonObject]) -> AsyncGenerator[str]:
    """The chunks as server-sent events; an error after the first token is the last event. Leaving closes `chunks`."""
    try:
        async with aclosing(chunks):
            yield f"data: {json.dumps(opening)}\n\n"
            async for chunk in chunks:
                yield f"data: {json.dumps(chunk)}\n\n"
    except Exception as exc:
        _, body = http_errors.describe(exc)
        yield f"data: {json.dumps(body)}\n\n"
        return
    yield "data: [DONE]\n\n"


def adapter_folders(path: Path) -> list[Path]:
    """`path` itself when it is an adapter, else the adapters in it, sorted."""
    if (path / "adapter_config.json").exists():
        return [path]
    return sorted(config.parent for config in path.glob("*/adapter_config.json"))


def is_loopback(http: Request) -> bool:
    """Whether the client is on this machine; one that comes through a reverse proxy is not."""
    if "forwarded" in http.headers or "x-forwarded-for" in http.headers:
        return False
    try:
        return http.client is not None and ipaddress.ip_address(http.client.host).is_loopback
    except ValueError:  # a Unix socket, or a proxy that gives a name
        return False
