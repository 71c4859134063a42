"""What comes in and goes out of the routes, apart from what they do."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.types import Scope

from deployments.api import error_table
from deployments.api.parsing import TextRequest
from deployments.api.responses import JsonObject
from deployments.errors import RequestInvalid
from deployments.observability.request_record import note_refusal


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
        _, body = error_table.describe(exc)
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
        _, body = error_table.describe(exc)
        note_refusal(body["error"]["code"])
        yield f"{json.dumps(body)}\n"


def path_of(scope: Scope) -> str:
    """The path as routes are matched: below where the application is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
