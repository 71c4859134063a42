"""The bank in vLLM's worker processes, as the front end's assignment of rows sees it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from gpu_worker.bank.device_layout import DeviceAdapter
from gpu_worker.bank.residency import RowAssignment
from gpu_worker.errors import PlanTooLarge
from gpu_worker.vllm.fusions import adapters_of, contains_any, parts_of
from gpu_worker.vllm.packing import PackedAdapter, packed

logger = logging.getLogger(__name__)

Change = tuple[Any, ...]


class PlannedResidency:
    """Decides which adapters and which fusions are in the workers' banks. Each kind has rows of its own.

    The workers place the rows themselves, so nothing is moved here. A plan has either adapters or one fusion.
    """

    def __init__(self, bank: RemoteBank, num_rows: int, num_fusion_rows: int) -> None:
        self._num_fusion_rows = num_fusion_rows
        self._adapters, self._fusions = _Assignment(_Part(bank, num_rows)), _Assignment(_Part(bank, num_fusion_rows))

    def __contains__(self, digest: object) -> bool:
        return digest in self._adapters or digest in self._fusions

    @property
    def resident(self) -> frozenset[str]:
        """Return the weights digests of all adapters in the bank, those in fusions included."""
        return self._adapters.resident.union(adapters_of(self._fusions.resident))

    @property
    def occupied_rows(self) -> int:
        return self._adapters.occupied_rows + self._fusions.occupied_rows

    @property
    def active_rows(self) -> int:
        return self._adapters.active_rows + self._fusions.active_rows

    @property
    def num_changes(self) -> int:
        return self._adapters.num_changes + self._fusions.num_changes

    def try_pin(self, digests: Sequence[str], loaded: Mapping[str, DeviceAdapter]) -> bool:
        """See `RowAssignment.try_pin`. Raises: PlanTooLarge."""
        part = self.part_of(digests)
        if part is self._fusions:
            needed = max([adapter.max_rank for adapter in loaded.values()], default=0)
            if needed > self._num_fusion_rows:
                raise PlanTooLarge(
                    f"the fusion needs {needed} rank rows, the bank has {self._num_fusion_rows} for fusions"
                    " (worker.fusion_rank_rows); use adapters of lower rank, or another strategy"
                )
        return part.try_pin(digests, loaded)

    def unpin(self, digests: Sequence[str]) -> None:
        self.part_of(digests).unpin(digests)

    def settle(self) -> None:
        """Send the new adapters and fusions. Call once after all changes."""
        for part in (self._adapters, self._fusions):
            part.settle()

    def drop(self, digests: Collection[str]) -> None:
        """Free the rows of these adapters, which no row uses, and of the fusions that contain one of them."""
        for digest in self._adapters.resident.intersection(digests):
            self._adapters.evict(digest)
        for digest in self._fusions.resident:
            if contains_any(digest, digests):
                self._fusions.evict(digest)

    def part_of(self, digests: Sequence[str]) -> RowAssignment:
        """Return the assignment of the rows that these adapters or this fusion use."""
        return self._fusions if digests and parts_of(digests[0]) is not None else self._adapters


class _Assignment(RowAssignment):
    def settle(self) -> None:
        self.active_rows = sum(len(self._rows[digest]) for digest in self._pins)
        self._write_new()


class _Part:
    """A number of the bank's rows, as an AdapterStore."""

    def __init__(self, bank: RemoteBank, num_rows: int) -> None:
        self._bank, self.num_rows = bank, num_rows
        self._digests: dict[int, str] = {}  # first row -> digest

    def write(self, rows: Sequence[int], adapter: DeviceAdapter) -> None:
        self._digests[rows[0]] = adapter.weights_digest
        self._bank.put(adapter)

    def free(self, rows: Sequence[int]) -> None:
        digest = self._digests.pop(rows[0], None)
        if digest is not None:  # otherwise the adapter was evicted before `settle` sent it
            self._bank.drop(digest)


class RemoteBank:
    """Sends changes of the workers' banks to them, in order and several at a time.

    `send`: applies changes in all workers between two of their steps. `on_failure`: called with its error, after which
    the workers' banks are unknown and the engine must end.
    """

    def __init__(
        self, send: Callable[[list[Change]], Awaitable[object]], on_failure: Callable[[Exception], object]
    ) -> None:
        self._send, self._on_failure = send, on_failure
        self._queue: list[tuple[str, DeviceAdapter | None]] = []
        self._written: dict[str, asyncio.Event] = {}  # digest -> set once the workers hold it
        self._sender: asyncio.Task[None] | None = None

    def put(self, adapter: DeviceAdapter) -> None:
        self._written[adapter.weights_digest] = asyncio.Event()
        self._append(adapter.weights_digest, adapter)

    def drop(self, digest: str) -> None:
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
