"""Write streamed answers: server-sent events, or one JSON object per line."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from deployments.api import error_table
from deployments.json_types import JsonObject
from deployments.observability.request_metrics import RequestContext

KEEP_ALIVE_S = 10.0  # proxies close a connection that is silent for 30 s or more
_DONE = format_sse_event(data_str="[DONE]")


async def events(
    opening: JsonObject | None,
    chunks: AsyncGenerator[JsonObject | None],
    context: RequestContext,
    *,
    keep_alive_s: float = KEEP_ALIVE_S,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncGenerator[bytes]:
    """Yield `opening` and the chunks as server-sent events. An error becomes the last event. Leaving closes `chunks`.

    A chunk of None is a heartbeat of the source: it becomes a comment if the stream was silent for `keep_alive_s`.
    """
    try:
        async with aclosing(chunks):
            yield _event(opening)
            sent_at = clock()
            async for chunk in chunks:
                if chunk is not None:
                    yield _event(chunk)
                elif clock() - sent_at >= keep_alive_s:
                    yield KEEPALIVE_COMMENT
                else:
                    continue
                sent_at = clock()
    except Exception as exc:
        yield _event(_error_object(exc, context))
        return
    yield _DONE


async def json_lines(
    opening: JsonObject, lines: AsyncGenerator[JsonObject], context: RequestContext
) -> AsyncGenerator[str]:
    """Yield `opening` and the lines as one JSON object each. An error becomes the last line. Leaving closes `lines`."""
    try:
        async with aclosing(lines):
            yield f"{json.dumps(opening)}\n"
            async for line in lines:
                yield f"{json.dumps(line)}\n"
    except Exception as exc:
        yield f"{json.dumps(_error_object(exc, context))}\n"


def _event(chunk: JsonObject | None) -> bytes:
    return format_sse_event(data_str=json.dumps(chunk))


def _error_object(error: Exception, context: RequestContext) -> JsonObject:
    _, body = error_table.describe(error)
    context.code = body["error"]["code"]
    return body
