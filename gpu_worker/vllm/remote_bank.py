"""The bank in vLLM's worker processes, as the front end's assignment of rows sees it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from gpu_worker.bank.device_layout import DeviceAdapter
from gpu_worker.bank.residency import RowAssignment
from gpu_worker.vllm.packing import PackedAdapter, packed

logger = logging.getLogger(__name__)

Change = tuple[Any, ...]


class PlannedResidency(RowAssignment):
    """Decides which adapters are in the workers' banks. They place the rows themselves, so nothing is moved here."""

    def settle(self) -> None:
        """Send the new adapters. Call once after all changes."""
        self.active_rows = sum(len(self._rows[digest]) for digest in self._pins)
        self._write_new()


class RemoteBank:
    """An AdapterStore that sends its changes to the workers, in order and several at a time.

    `send`: applies changes in all workers between two of their steps. `on_failure`: called with its error, after which
    the workers' banks are unknown and the engine must end.
    """

    def __init__(
        self,
        num_rows: int,
        send: Callable[[list[Change]], Awaitable[object]],
        on_failure: Callable[[Exception], object],
    ) -> None:
        self.num_rows = num_rows
        self._send, self._on_failure = send, on_failure
        self._queue: list[tuple[str, DeviceAdapter | None]] = []
        self._digests: dict[int, str] = {}  # first row -> digest
        self._written: dict[str, asyncio.Event] = {}  # digest -> set once the workers hold it
        self._sender: asyncio.Task[None] | None = None

    def write(self, rows: Sequence[int], adapter: DeviceAdapter) -> None:
        self._digests[rows[0]] = adapter.weights_digest
        self._written[adapter.weights_digest] = asyncio.Event()
        self._append(adapter.weights_digest, adapter)

    def free(self, rows: Sequence[int]) -> None:
        digest = self._digests.pop(rows[0], None)
        if digest is not None:  # otherwise the adapter was evicted before `settle` sent it
            del self._written[digest]
            self._append(digest, None)

    async def written(self, digests: Iterable[str]) -> None:
        """Return once the workers hold these adapters, which are pinned."""
        for digest in digests:
            await self._written[digest].wait()

    async def drained(self) -> None:
        """Return once all changes so far have been applied."""
        while self._sender is not None:
            await asyncio.shield(self._sender)

    def _append(self, digest: str, adapter: DeviceAdapter | None) -> None:
        self._queue.append((digest, adapter))
        if self._sender is None:
            self._sender = asyncio.get_running_loop().create_task(self._send_all())

    async def _send_all(self) -> None:
        try:
            while self._queue:
                changes, self._queue = self._queue, []
                await self._send(await asyncio.to_thread(_encoded, changes))
                for digest, adapter in changes:
                    if adapter is not None and digest in self._written:
                        self._written[digest].set()
        except Exception as exc:
            logger.exception("cannot change the adapters of the vLLM workers")
            self._on_failure(exc)
        finally:
            self._sender = None


def _encoded(changes: Sequence[tuple[str, DeviceAdapter | None]]) -> list[Change]:
    """Return the changes as plain values."""
    encoded: list[Change] = []
    for digest, adapter in changes:
        if adapter is None:
            encoded.append(("drop", digest))
        else:
            encoded.append(_put(packed(adapter)))
    return encoded


def _put(adapter: PackedAdapter) -> Change:
    return "put", adapter.digest, adapter.dtype, adapter.modules, adapter.values
