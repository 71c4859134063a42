"""Carry the events of one request from the engine to an asyncio consumer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

from gpu_worker.request.request import Delta

Events = asyncio.Queue[Delta | Exception]


async def deltas(events: Events, interval_s: float, heartbeat_interval_s: float | None) -> AsyncGenerator[Delta | None]:
    """Yield the first delta at once, then all deltas of each interval merged into one, until the last one.

    Yield None as a heartbeat after `heartbeat_interval_s` without a delta. Raises: the exception among the events.
    """
    while True:
        while (event := await next_event(events, heartbeat_interval_s)) is None:
            yield None
        delta = merged(event, events)
        yield delta
        if delta.finish_reason is not None:
            return
        await asyncio.sleep(interval_s)


async def next_event(events: Events, within_s: float | None) -> Delta | Exception | None:
    """Return the next event, or None on timeout. An event that arrives at the timeout stays in the queue."""
    try:
        async with asyncio.timeout(within_s):
            return await events.get()
    except TimeoutError:
        return None


def merged(first: Delta | Exception, events: Events) -> Delta:
    """Merge `first` with all queued deltas. Raises: the exception among them."""
    result = first
    while not isinstance(result, Exception):
        if events.empty():
            return result
        event = events.get_nowait()
        if isinstance(event, Exception):
            result = event
        else:
            result = replace(
                event,
                text=result.text + event.text,
                first_logits=result.first_logits if event.first_logits is None else event.first_logits,
                logprobs=result.logprobs + event.logprobs,
                tool_calls=result.tool_calls + event.tool_calls,
                prompt=result.prompt or event.prompt,
            )
    raise result
