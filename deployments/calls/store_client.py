"""The Store as its callers see it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from ray.serve.handle import DeploymentHandle

from deployments.api.publish_item import PublishItem
from deployments.calls.serve_calls import ServeCalls
from lora_store import (
    AdapterRecord,
    AdapterRef,
    Collected,
    Embedding,
    Key,
    Precondition,
    Staged,
    StoreUnavailable,
    TenantQuota,
    Visibility,
    Withdrawn,
)
from lora_store.garbage_collection import Verified

T = TypeVar("T")
Shapes = Mapping[str, tuple[int, int]]
"""(out, in) of every module that an adapter may target."""
Buffer = NDArray[np.uint8]
WAIT_S = 60.0  # longer than the Store takes to report that its disk does not answer


class WeightsSource(Protocol):
    """Where a Worker gets adapter weights. Batch jobs implement it without Serve."""

    async def fetch(self, digest: str) -> Buffer:
        """Return the canonical bytes of the weights.

        Raises: AdapterNotFound, BlobCorrupted, StoreUnavailable; an error of Ray if the replica or the bytes are lost.
        """
        ...


class StoreCalls(Protocol):
    """The calls that any one replica answers."""

    async def stage(self, upload: PublishItem, module_shapes: Shapes) -> Staged: ...
    async def restage(self, record: AdapterRecord) -> Staged: ...
    async def commit(
        self,
        staged: Sequence[Staged],
        embeddings: Sequence[Embedding | None],
        probe_shifts: Sequence[float | None],
        actor: str,
        precondition: Precondition = "any",
        quota: TenantQuota | None = None,
        commit_id: str | None = None,
    ) -> int: ...
    async def discard(self, staged: Sequence[Staged]) -> None: ...
    async def withdraw(
        self, tenant: str, names: Sequence[str], actor: str, commit_id: str | None = None
    ) -> Withdrawn: ...
    async def set_visibility(self, tenant: str, name: str, visibility: Visibility, actor: str) -> int: ...
    async def approve(self, refs: Sequence[AdapterRef], actor: str) -> int: ...
    async def add_embeddings(self, embeddings: Mapping[AdapterRef, Embedding]) -> int: ...
    async def activate_encoder(self, model: str, identity: str, actor: str) -> int: ...
    async def active_encoder(self) -> str | None: ...
    async def versions(self, keys: Collection[Key]) -> dict[Key, tuple[AdapterRecord, ...]]: ...
    async def unreferenced(self, digests: Collection[str]) -> list[str]: ...
    async def sweep(self, digests: Collection[str]) -> list[str]: ...
    async def gc(self, retention_s: float) -> Collected: ...
    def verify(self, tenant: str) -> AsyncIterator[Verified]: ...


class StoreReplica(StoreCalls, Protocol):
    """One replica of the Store deployment."""

    async def ping(self) -> None: ...
    async def fetch(self, digest: str) -> Sequence[Awaitable[Buffer]]: ...
    async def release(self, digests: Collection[str]) -> bool: ...


class StoreClient(StoreCalls, WeightsSource, Protocol):
    """The Store deployment."""

    async def check_available(self) -> None:
        """Check that a replica can read the catalogue, before a change begins. Raises: StoreUnavailable."""
        ...

    def verify(self, tenant: str) -> AsyncGenerator[Verified]: ...
    async def broadcast_release(self, digests: Collection[str], timeout_s: float) -> list[bool | BaseException]:
        """Return the answer or error of each replica. Raises: DeploymentUnavailableError, TimeoutError."""
        ...


class ServeStore(StoreClient):
    """Calls the Store through Serve.

    Reads, stages and writes with a commit id are repeated if their replica dies. Other writes are sent once. The first
    call of each change is a read that ends with StoreUnavailable after `wait_s`: a replica cannot start while its disk
    is away, and calls without a replica would wait for ever.
    """

    def __init__(self, handle: DeploymentHandle, *, wait_s: float = WAIT_S) -> None:
        self._calls: ServeCalls[StoreReplica] = ServeCalls(handle)
        self._wait_s = wait_s

    async def check_available(self) -> None:
        await self._in_time(lambda: self._calls.retry(StoreReplica.ping))

    async def active_encoder(self) -> str | None:
        return await self._in_time(lambda: self._calls.retry(StoreReplica.active_encoder))

    async def versions(self, keys: Collection[Key]) -> dict[Key, tuple[AdapterRecord, ...]]:
        return await self._in_time(lambda: self._calls.retry(StoreReplica.versions, keys))

    async def stage(self, upload: PublishItem, module_shapes: Shapes) -> Staged:
        calls = self._calls.over_object_store()  # large files are not copied where they arrive
        return await calls.retry(StoreReplica.stage, upload, module_shapes)

    async def restage(self, record: AdapterRecord) -> Staged:
        return await self._calls.retry(StoreReplica.restage, record)

    async def commit(
        self,
        staged: Sequence[Staged],
        embeddings: Sequence[Embedding | None],
        probe_shifts: Sequence[float | None],
        actor: str,
        precondition: Precondition = "any",
        quota: TenantQuota | None = None,
        commit_id: str | None = None,
    ) -> int:
        calls, commit = self._calls, StoreReplica.commit
        args = (staged, embeddings, probe_shifts, actor, precondition, quota, commit_id)
        return await (calls.once(commit, *args) if commit_id is None else calls.retry(commit, *args))

    async def discard(self, staged: Sequence[Staged]) -> None:
        await self._calls.once(StoreReplica.discard, staged)

    async def withdraw(self, tenant: str, names: Sequence[str], actor: str, commit_id: str | None = None) -> Withdrawn:
        calls, withdraw = self._calls, StoreReplica.withdraw
        args = (tenant, names, actor, commit_id)
        return await (calls.once(withdraw, *args) if commit_id is None else calls.retry(withdraw, *args))

    async def set_visibility(self, tenant: str, name: str, visibility: Visibility, actor: str) -> int:
        return await self._calls.once(StoreReplica.set_visibility, tenant, name, visibility, actor)

    async def approve(self, refs: Sequence[AdapterRef], actor: str) -> int:
        return await self._calls.once(StoreReplica.approve, refs, actor)

    async def add_embeddings(self, embeddings: Mapping[AdapterRef, Embedding]) -> int:
        return await self._calls.once(StoreReplica.add_embeddings, embeddings)

    async def activate_encoder(self, model: str, identity: str, actor: str) -> int:
        return await self._calls.once(StoreReplica.activate_encoder, model, identity, actor)

    async def unreferenced(self, digests: Collection[str]) -> list[str]:
        return await self._calls.once(StoreReplica.unreferenced, digests)

    async def sweep(self, digests: Collection[str]) -> list[str]:
        return await self._calls.once(StoreReplica.sweep, digests)

    async def gc(self, retention_s: float) -> Collected:
        return await self._calls.once(StoreReplica.gc, retention_s)

    async def fetch(self, digest: str) -> Buffer:
        [ref] = await self._calls.over_object_store().once(StoreReplica.fetch, digest)
        return await ref

    def verify(self, tenant: str) -> AsyncGenerator[Verified]:
        return self._calls.stream(StoreReplica.verify, tenant)

    async def broadcast_release(self, digests: Collection[str], timeout_s: float) -> list[bool | BaseException]:
        return await self._calls.broadcast(timeout_s, StoreReplica.release, digests)

    async def _in_time(self, call: Callable[[], Awaitable[T]]) -> T:
        """Raises: StoreUnavailable if no replica answers within `wait_s`."""
        try:
            async with asyncio.timeout(self._wait_s):
                return await call()
        except TimeoutError as exc:
            raise StoreUnavailable(f"no replica answered within {self._wait_s:.0f} s") from exc
