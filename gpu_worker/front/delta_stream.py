"""Carry the events of one request from the engine to an asyncio consumer."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import replace

from gpu_worker.front.cpu_count import usable_cpus
from gpu_worker.front.request.request import Delta

MESSAGES_S_PER_CPU = 64  # a message takes one to two milliseconds of CPU time on its way to the client


class Events(asyncio.Queue[Delta | Exception]):
    """The events of one request, in order. `has_last` is set once the last one is in the queue."""

    def __init__(self) -> None:
        super().__init__()
        self.has_last = asyncio.Event()

    def put_nowait(self, item: Delta | Exception) -> None:
        super().put_nowait(item)
        if isinstance(item, Exception) or item.finish_reason is not None:
            self.has_last.set()


class EventMail:
    """Carries events to the queues of an event loop. Those that are sent before the loop looks wake it once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._sent: deque[tuple[Events, Delta | Exception]] = deque()
        self._is_due = False  # the loop will deliver

    def send(self, events: Events, event: Delta | Exception) -> None:
        """Put the event into the queue soon. Call it from any thread. Raises: RuntimeError if the loop is closed."""
        self._sent.append((events, event))
        if not self._is_due or self.loop.is_closed():
            self._is_due = True
            try:
                self.loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                self._is_due = False
                raise

    def _deliver(self) -> None:
        self._is_due = False  # first: an event that is sent from here on schedules another delivery
        while self._sent:
            events, event = self._sent.popleft()
            events.put_nowait(event)


class StreamPace:
    """The times at which streams send. The interval grows with the number of streams that an engine sends.

    All streams together send at most `messages_s` deltas a second, not counting first and last ones.
    With an interval of 0 every delta is sent at once. All streams send at the same times: many deltas in a row cost
    less on their way to the clients than one every few milliseconds, and disturb fewer of the engine's steps.
    """

    def __init__(self, interval_ms: float, messages_s: float | None = None) -> None:
        self._shortest_s = interval_ms / 1000
        self._messages_s = messages_s or MESSAGES_S_PER_CPU * usable_cpus()
        self.sending: set[Events] = set()  # those that have sent their first delta

    @property
    def interval_s(self) -> float:
        return max(self._shortest_s, len(self.sending) / self._messages_s) if self._shortest_s else 0.0

    def next_at(self, now: float) -> float:
        """Return the next time at which streams send: a multiple of the interval, half to one and a half after now."""
        interval_s = self.interval_s
        return math.ceil(now / interval_s + 0.5) * interval_s if interval_s else now


async def deltas(events: Events, pace: StreamPace, heartbeat_interval_s: float | None) -> AsyncGenerator[Delta | None]:
    """Yield the first delta at once, then all deltas of each interval merged into one, and the last one at once.

    Yield None as a heartbeat after `heartbeat_interval_s` without a delta. Raises: the exception among the events.
    """
    loop = asyncio.get_running_loop()
    try:
        while True:
            while (event := await next_event(events, heartbeat_interval_s)) is None:
                yield None
            delta = merged(event, events)
            yield delta
            if delta.finish_reason is not None:
                return
            pace.sending.add(events)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(pace.next_at(loop.time())):
                    await events.has_last.wait()
    finally:
        pace.sending.discard(events)


async def next_event(events: Events, within_s: float | None) -> Delta | Exception | None:
    """Return the next event, or None on timeout. An event that arrives at the timeout stays in the queue."""
    if not events.empty():
        return events.get_nowait()
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
        result = event if isinstance(event, Exception) else joined(result, event)
    raise result


def joined(first: Delta, second: Delta) -> Delta:
    """Return both deltas as one."""
    return replace(
        second,
        text=first.text + second.text,
        first_logits=first.first_logits if second.first_logits is None else second.first_logits,
        logprobs=first.logprobs + second.logprobs,
        tool_calls=first.tool_calls + second.tool_calls,
        prompt=first.prompt or second.prompt,
    )
