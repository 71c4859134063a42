"""Tell the request routers what each worker holds, at the beginning of each answer.

Serve's controller could spread it as routing stats. It sends the lists of all workers to every router whenever one of
them changes, up to 10 times a second. Instead, the first item of each answer, which a worker sends anyway, is the list
of that worker, with six bytes for each adapter.

A report is whole and numbered, so none needs another one. A lost report leaves an older one in force, and repeated or
late reports change nothing. A router with an old report chooses a worker that must load the adapter first.

While a new version of the server is deployed, its workers answer the old version's routers too. A report therefore
arrives as a plain tuple, of which later versions may change anything: routers ignore what they do not know.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import Any, NamedTuple

from gpu_worker.errors import EngineStopped

_DIGEST_BYTES = 6  # a collision of 48 bits costs only one load
_MAX_WORKERS = 1_000  # that a process remembers, those that have ended included


def short_digest(weights_digest: str) -> bytes:
    """Return the first six bytes of the digest."""
    return bytes.fromhex(weights_digest[: 2 * _DIGEST_BYTES])


class ResidencyReport(NamedTuple):
    """Short digests of the adapters in a worker's bank and of its waiting requests, joined.

    `worker`: the replica's unique id. A higher number is of a later state.
    """

    worker: str
    number: int
    digests: bytes

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a plain tuple: the process that reads it may have another version of this class, or none."""
        return tuple, (tuple(self),)


class Residency:
    """The adapters of this worker, as its engine told last, with those of requests that came since.

    The engine answers between two steps, so no answer waits for it. Use it on one event loop.
    """

    def __init__(self, worker: str, ask: Callable[[], Awaitable[Collection[str]]]) -> None:
        """`worker`: the replica's unique id. `ask` returns the weights digests in the bank and of waiting requests."""
        self._worker, self._ask = worker, ask
        self._held: frozenset[bytes] = frozenset()
        self._number = 0
        self._asking: asyncio.Task[None] | None = None

    def report(self, weights_digests: Collection[str]) -> ResidencyReport:
        """Return what the worker holds, with these adapters of a new request."""
        self._set(self._held.union(map(short_digest, weights_digests)))
        return ResidencyReport(self._worker, self._number, b"".join(self._held))

    def refresh(self) -> None:
        """Ask the engine, unless it is being asked. Call it when a request has its adapters or has failed."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._refresh())

    async def _refresh(self) -> None:
        with suppress(EngineStopped):
            self._set(frozenset(map(short_digest, await self._ask())))

    def _set(self, held: frozenset[bytes]) -> None:
        if held != self._held:
            self._held, self._number = held, self._number + 1


class HeardReports:
    """The newest report of each worker that this process has heard.

    One event loop hears. Other threads, such as those of Serve's routers, may ask.
    """

    def __init__(self) -> None:
        self._newest: OrderedDict[str, tuple[int, frozenset[bytes]]] = OrderedDict()

    def hear(self, report: tuple[object, ...]) -> None:
        """Keep the report unless a later one of that worker was heard. Ignore fields and reports of an unknown form."""
        match report:
            case (str() as worker, int() as number, bytes() as digests, *_):
                self._keep(worker, number, digests)

    def _keep(self, worker: str, number: int, digests: bytes) -> None:
        newest = self._newest.get(worker)
        if newest is None or number > newest[0]:
            starts = range(0, len(digests), _DIGEST_BYTES)
            held = frozenset(digests[start : start + _DIGEST_BYTES] for start in starts)
            self._newest[worker] = number, held
        self._newest.move_to_end(worker)
        if len(self._newest) > _MAX_WORKERS:
            self._newest.popitem(last=False)

    def held_by(self, worker: str) -> frozenset[bytes]:
        """Return the short digests of the adapters that this worker holds as far as is known."""
        found = self._newest.get(worker)
        return frozenset() if found is None else found[1]


HEARD = HeardReports()
"""Of this process: Serve makes the router, and an answer's reader cannot reach it otherwise."""
