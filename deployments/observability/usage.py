"""Record who used what: one event for each request, in a file of this machine before the answer ends, then in the pool.

The death of any process loses no event: what is written to a file is the kernel's. Every few seconds, and when a
replica stops, its segment is sent to the Store. A segment whose writer died is sent by any Ingress replica of that
machine. The loss of a whole machine loses the events of its Ingress replicas since they were last sent; to flush each
answer to a disk that is lost with its machine would not help.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from uuid import uuid4
from weakref import WeakValueDictionary

from deployments.observability.request_context import RequestContext

logger = logging.getLogger(__name__)
SEND_EVERY_S = 10.0
_SEND_TIMEOUT_S = 60.0
_SUFFIX = ".jsonl"


class UsageLog:
    """The events of one Ingress replica. A segment is locked while its writer lives, and nobody else sends it.

    Without a `folder` nothing is recorded. `base`: the base model of requests whose plan names none. `send` stores a
    segment under its name; repeating it changes nothing.
    """

    def __init__(self, folder: Path | None, base: str, send: Callable[[str, bytes], Awaitable[None]]) -> None:
        self._folder, self._base, self._send = folder, base, send
        self._segment: int | None = None  # the descriptor of the open segment
        self._is_failing = False
        self._turn = asyncio.Lock()
        self._reports: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def record(self, context: RequestContext, status: int | None = None) -> None:
        """Record the request, once. Requests without a caller and reads of the pool (GET) are not recorded.

        An error of the disk is logged, and the client gets its answer.
        """
        if context.is_recorded or context.caller is None or context.method == "GET":
            return
        context.is_recorded = True
        if self._folder is None:
            return
        status = context.status if status is None else status
        parts = _split_by_base(context)
        line = b"".join(encode_event(part, part.base_model or self._base, status) for part in parts)
        # A line that the disk took in part is ended first. The segment stays open: a new one for each request would
        # fill the disk with empty files.
        data = b"\n" + line if self._is_failing else line
        try:
            if self._segment is None:
                self._segment = _new_segment(self._folder)
            if os.write(self._segment, data) != len(data):
                raise OSError("the disk took a part of an event")
            self._is_failing = False
        except OSError as exc:
            if not self._is_failing:
                logger.error("usage is not recorded: %s: %s; the lines of requests in this log have it", line, exc)
            self._is_failing = True

    def report_turn(self, tenant: str) -> asyncio.Lock:
        """Return the lock under which this tenant's reports are read, one after the other.

        A report holds one of the Store's calls for as long as it reads, and publishing needs these too.
        """
        turn = self._reports.get(tenant)
        if turn is None:
            turn = self._reports[tenant] = asyncio.Lock()
        return turn

    async def send_all(self) -> None:
        """Send this replica's events and those of dead replicas. Raises: StoreUnavailable, TimeoutError."""
        if self._folder is None:
            return
        async with self._turn:
            self.close()
            for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
                await self._send_segment(path)

    async def keep_sending(self, every_s: float = SEND_EVERY_S) -> None:
        """Send what was recorded, again and again. Warn first of segments for another `store_uri`."""
        own = self._folder
        try:
            others = [] if own is None else [path for path in own.parent.glob(f"*/*{_SUFFIX}") if path.parent != own]
        except OSError as exc:  # another server may remove a folder meanwhile
            others = []
            logger.warning("usage files for another store_uri cannot be listed: %s", exc)
        if others:
            remedy = "if this is the same pool, and their server has ended, move them to"
            logger.warning("%d usage files are for another store_uri: %s; %s %s", len(others), others[0], remedy, own)
        while True:
            try:
                await self.send_all()
            except Exception as exc:
                logger.warning("usage stays on this machine and is sent later: %s", exc or type(exc).__name__)
            await asyncio.sleep(every_s)

    def close(self) -> None:
        """End the open segment. Any replica of this machine sends it then."""
        if self._segment is not None:
            os.close(self._segment)  # releases the lock
            self._segment = None

    async def _send_segment(self, path: Path) -> None:
        with suppress(FileNotFoundError):  # another replica has sent it
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lines = await asyncio.to_thread(_read_all, descriptor)
                async with asyncio.timeout(_SEND_TIMEOUT_S):
                    await self._send(path.stem, lines)
                path.unlink()
            except BlockingIOError:
                pass  # its writer lives, or another replica sends it
            finally:
                os.close(descriptor)


def _split_by_base(context: RequestContext) -> list[RequestContext]:
    """Return the request once for each base model that answers, each with its own prompts, adapters and tokens."""
    places: dict[str, list[int]] = {}
    for place, planned in enumerate(context.plans):
        places.setdefault(planned.plan.base_model, []).append(place)
    if len(places) < 2:
        return [context]
    parts = []
    for own in places.values():
        rows = {index: row for index, row in context.rows.items() if index // context.num_choices in own}
        part = replace(context, rows=rows)
        part.record_plans([context.plans[place] for place in own], context.plan_s or 0.0)
        parts.append(part)
    return parts


def _new_segment(folder: Path) -> int:
    """Return the descriptor of a new segment. It has its name once it is locked."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = uuid4().hex
    path = folder / f".{name}"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        path.rename(folder / f"{name}{_SUFFIX}")
    except OSError:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    return descriptor


def _read_all(descriptor: int) -> bytes:
    with open(descriptor, "rb", closefd=False) as file:
        return file.read()


def encode_event(context: RequestContext, base: str, status: int, *, ended_at: datetime | None = None) -> bytes:
    """Return the line of a request in a segment. By default it ends now; one with an `ended_at` has no durations."""
    assert context.caller is not None
    num_prompt, num_cached, num_new = context.num_tokens
    first_s = context.first_token_s if ended_at is None else None
    event = {
        "time": int((time.time() if ended_at is None else ended_at.timestamp()) * 1000),
        "request_id": context.request_id,
        "tenant": context.caller.tenant,
        "key": context.caller.key_id,
        "route": context.route,
        "model": context.model,
        "base": base,
        "adapters": [{"name": name, "digest": digest, "weight": weight} for name, digest, weight in context.used],
        "prompt_tokens": num_prompt,
        "cached_tokens": num_cached,
        "completion_tokens": num_new,
        "status": status,
        "code": context.code,
        "queued_s": round(context.queued_s, 4),
        "first_token_s": None if first_s is None else round(first_s, 4),
        "total_s": round(time.monotonic() - context.arrived_at, 4) if ended_at is None else None,
    }
    return json.dumps(event).encode() + b"\n"
