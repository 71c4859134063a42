"""The bank in vLLM's worker processes, as the front end's assignment of rows sees it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gpu_worker.bank.device_layout import DeviceAdapter
from gpu_worker.bank.residency import RowAssignment
from gpu_worker.errors import AdapterUnfit, PlanTooLarge
from gpu_worker.vllm.fusions import contains_any, list_adapters, split_name
from gpu_worker.vllm.packing import Change, packed

logger = logging.getLogger(__name__)

_MOST_SENT_BYTES = 1 << 28

Send = Callable[[list[Change]], Awaitable[Mapping[str, str]]]
"""Applies changes in all workers between two of their steps. Returns why adapters are unfit, by weights digest."""


class PlannedResidency:
    """Decides which adapters and which fusions are in the workers' banks. Each kind has rows of its own.

    The workers place the rows themselves, so nothing is moved here. A plan has either adapters or one fusion.
    """

    def __init__(
        self, bank: RemoteBank, num_rows: int, num_fusion_rows: int, expert_bytes: tuple[int, int] = (0, 0)
    ) -> None:
        """`expert_bytes`: the most bytes of the experts of all adapters, and of those of all fusions."""
        self._num_fusion_rows = num_fusion_rows
        self._adapters = _Assignment(_Part(bank, num_rows), expert_bytes[0])
        self._fusions = _Assignment(_Part(bank, num_fusion_rows), expert_bytes[1])

    def __contains__(self, digest: object) -> bool:
        return digest in self._adapters or digest in self._fusions

    @property
    def resident(self) -> frozenset[str]:
        """Return the weights digests of all adapters in the bank, those in fusions included."""
        return self._adapters.resident.union(list_adapters(self._fusions.resident))

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
        return self._fusions if digests and split_name(digests[0]) is not None else self._adapters


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


@dataclass(slots=True, eq=False)
class _Put:
    """An adapter that the workers get. `adapter`: until it is sent; a bank of any size would be twice in memory.

    `is_done`: they have answered. `refusals`: why they do not hold it.
    """

    digest: str
    adapter: DeviceAdapter | None
    is_done: asyncio.Event = field(default_factory=asyncio.Event)
    refusals: list[str] = field(default_factory=list)


_Queued = _Put | str | asyncio.Event
"""An adapter to send, the digest of one to drop, or what to set when all before it has been applied."""


class RemoteBank:
    """Sends changes of the workers' banks to them, in order and several at a time.

    `on_failure`: called with an error of `send`, after which the workers' banks are unknown and the engine must end.
    `most_bytes`: of the adapters that are sent together, unless one has more. No step is computed meanwhile.
    """

    def __init__(
        self, send: Send, on_failure: Callable[[Exception], object], most_bytes: int = _MOST_SENT_BYTES
    ) -> None:
        self._send, self._on_failure, self._most_bytes = send, on_failure, most_bytes
        self._queue: list[_Queued] = []
        self._puts: dict[str, _Put] = {}  # the last one of each digest
        self._sender: asyncio.Task[None] | None = None

    def put(self, adapter: DeviceAdapter) -> None:
        put = self._puts[adapter.weights_digest] = _Put(adapter.weights_digest, adapter)
        self._append(put)

    def drop(self, digest: str) -> None:
        del self._puts[digest]
        self._append(digest)

    async def written(self, digests: Iterable[str]) -> None:
        """Return once the workers hold these adapters, which are pinned. Raises: AdapterUnfit if they refuse one."""
        for put in [self._puts[digest] for digest in digests]:
            await put.is_done.wait()
            if put.refusals:
                raise AdapterUnfit(put.refusals[0])

    async def drained(self) -> None:
        """Return once all changes so far have been applied, or cannot be."""
        if self._sender is not None:
            applied = asyncio.Event()
            self._queue.append(applied)
            await applied.wait()

    def _append(self, change: _Put | str) -> None:
        self._queue.append(change)
        if self._sender is None:
            self._sender = asyncio.get_running_loop().create_task(self._send_all())

    async def _send_all(self) -> None:
        changes: list[_Queued] = []
        try:
            while self._queue:
                changes = self._take()
                encoded = await asyncio.to_thread(_encoded, changes)
                unfit = await self._send(encoded) if encoded else {}
                for change in changes:
                    if isinstance(change, _Put):
                        _end(change, unfit)
                _set_events(changes)
        except Exception as exc:
            logger.exception("cannot change the adapters of the vLLM workers")
            self._on_failure(exc)
        finally:
            self._sender = None
            _set_events([*changes, *self._queue])

    def _take(self) -> list[_Queued]:
        """Take the next changes from the queue, at least one."""
        num_bytes = num_taken = 0
        for change in self._queue:
            num_bytes += change.adapter.num_bytes if isinstance(change, _Put) and change.adapter is not None else 0
            if num_taken and num_bytes > self._most_bytes:
                break
            num_taken += 1
        taken, self._queue = self._queue[:num_taken], self._queue[num_taken:]
        return taken


def _set_events(changes: Sequence[_Queued]) -> None:
    for change in changes:
        if isinstance(change, asyncio.Event):
            change.set()


def _end(put: _Put, unfit: Mapping[str, str]) -> None:
    if put.digest in unfit:
        logger.warning("the vLLM workers refuse the adapter %s: %s", put.digest[:12], unfit[put.digest])
        put.refusals.append(unfit[put.digest])
    put.is_done.set()


def _encoded(changes: Sequence[_Queued]) -> list[Change]:
    """Return the changes as plain values, and let go of the adapters."""
    encoded: list[Change] = []
    for change in changes:
        if isinstance(change, str):
            encoded.append(("drop", change))
        elif isinstance(change, _Put) and change.adapter is not None:
            encoded.append(packed(change.adapter))
            change.adapter = None
    return encoded
