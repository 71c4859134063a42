"""The clients of the Store and the Retriever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from ray.serve.handle import DeploymentHandle

from deployments.api.adapters import PublishItem
from deployments.calls.serve_calls import ServeCalls
from lora_store import (
    AdapterRecord,
    AdapterRef,
    Collected,
    Embedding,
    Feedback,
    Key,
    Plan,
    Precondition,
    Ranking,
    Sample,
    Staged,
    StoreUnavailable,
    Strategy,
    TenantQuota,
    Trial,
    Visibility,
    Withdrawn,
)
from lora_store.feedback import Kind
from lora_store.garbage_collection import Verified
from retriever_svc import (
    DoctorStep,
    Learnt,
    Page,
    PageRequest,
    PinnedAdapter,
    Place,
    PoolMap,
    PoolSize,
    Region,
    ReindexStep,
    Resampled,
    Route,
    RouteRequest,
)
from retriever_svc.embedded import Embedded

T = TypeVar("T")
Shapes = Mapping[str, tuple[int, int]]
"""(out, in) of every module that an adapter may target."""
Buffer = NDArray[np.uint8]
WAIT_S = 60.0  # longer than the Store takes to report that its disk does not answer


class WeightsSource(Protocol):
    """The source of adapter weights for a Worker. Batch jobs implement it without Serve."""

    async def fetch(self, digest: str, *, is_suspect: bool = False) -> Sequence[Buffer]:
        """Return the canonical bytes of the weights in parts, which the caller hashes.

        `is_suspect`: their hash was wrong when they arrived before, so the stored file is hashed first.
        Raises: AdapterNotFound, BlobCorrupted, StoreUnavailable; an error of Ray if the replica or the bytes are lost.
        """
        ...


class StoreCalls(Protocol):
    """Calls that any one replica answers."""

    async def stage(self, upload: PublishItem, module_shapes: Shapes) -> Staged: ...
    async def restage(self, record: AdapterRecord) -> Staged: ...
    async def take_over(self, staged: Sequence[Staged]) -> list[Staged]: ...
    async def resample(self, live: AdapterRecord, samples: Sequence[Sample] | None) -> Staged: ...
    async def put_feedback(self, tenant: str, kind: Kind, feedback: Feedback) -> None: ...
    async def asked(self, tenant: str, request_id: str) -> Feedback | None: ...
    async def feedback(self, tenant: str, kind: Kind, adapter: str | None = None) -> list[Feedback]: ...
    async def delete_proposals(self, tenant: str, adapter: str, ids: Collection[str]) -> None: ...
    async def put_part(self, upload: str, number: int, data: Buffer) -> None: ...
    async def delete_parts(self, uploads: Collection[str]) -> None: ...
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
    async def expire(self, commit_id: str | None = None) -> Withdrawn: ...
    async def set_visibility(self, tenant: str, name: str, visibility: Visibility, actor: str) -> int: ...
    async def approve(self, refs: Sequence[AdapterRef], actor: str) -> int: ...
    async def set_trial(self, tenant: str, name: str, trial: Trial | None, actor: str) -> int: ...
    async def add_embeddings(self, embeddings: Mapping[AdapterRef, Embedding]) -> int: ...
    async def rank(self, tenant: str, rankings: Sequence[Ranking], actor: str, are_outcomes: bool = False) -> int: ...
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
    async def fetch(self, digest: str, is_suspect: bool = False) -> Sequence[Awaitable[Buffer]]: ...
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
    is away, and calls without a replica would wait forever.
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
        calls = self._calls.over_object_store()  # small files may be large together
        return await calls.retry(StoreReplica.stage, upload, module_shapes)

    async def put_part(self, upload: str, number: int, data: Buffer) -> None:
        await self._calls.over_object_store().retry(StoreReplica.put_part, upload, number, data)

    async def delete_parts(self, uploads: Collection[str]) -> None:
        await self._calls.once(StoreReplica.delete_parts, uploads)

    async def restage(self, record: AdapterRecord) -> Staged:
        return await self._calls.retry(StoreReplica.restage, record)

    async def take_over(self, staged: Sequence[Staged]) -> list[Staged]:
        return await self._calls.retry(StoreReplica.take_over, staged)

    async def resample(self, live: AdapterRecord, samples: Sequence[Sample] | None) -> Staged:
        return await self._calls.over_object_store().retry(StoreReplica.resample, live, samples)

    async def put_feedback(self, tenant: str, kind: Kind, feedback: Feedback) -> None:
        await self._calls.retry(StoreReplica.put_feedback, tenant, kind, feedback)

    async def asked(self, tenant: str, request_id: str) -> Feedback | None:
        return await self._calls.retry(StoreReplica.asked, tenant, request_id)

    async def feedback(self, tenant: str, kind: Kind, adapter: str | None = None) -> list[Feedback]:
        return await self._calls.retry(StoreReplica.feedback, tenant, kind, adapter)

    async def delete_proposals(self, tenant: str, adapter: str, ids: Collection[str]) -> None:
        await self._calls.retry(StoreReplica.delete_proposals, tenant, adapter, ids)

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

    async def expire(self, commit_id: str | None = None) -> Withdrawn:
        calls = self._calls
        return await (calls.once if commit_id is None else calls.retry)(StoreReplica.expire, commit_id)

    async def set_visibility(self, tenant: str, name: str, visibility: Visibility, actor: str) -> int:
        return await self._calls.once(StoreReplica.set_visibility, tenant, name, visibility, actor)

    async def set_trial(self, tenant: str, name: str, trial: Trial | None, actor: str) -> int:
        return await self._calls.retry(StoreReplica.set_trial, tenant, name, trial, actor)

    async def approve(self, refs: Sequence[AdapterRef], actor: str) -> int:
        return await self._calls.once(StoreReplica.approve, refs, actor)

    async def add_embeddings(self, embeddings: Mapping[AdapterRef, Embedding]) -> int:
        return await self._calls.once(StoreReplica.add_embeddings, embeddings)

    async def rank(self, tenant: str, rankings: Sequence[Ranking], actor: str, are_outcomes: bool = False) -> int:
        return await self._calls.once(StoreReplica.rank, tenant, rankings, actor, are_outcomes)

    async def activate_encoder(self, model: str, identity: str, actor: str) -> int:
        return await self._calls.once(StoreReplica.activate_encoder, model, identity, actor)

    async def unreferenced(self, digests: Collection[str]) -> list[str]:
        return await self._calls.once(StoreReplica.unreferenced, digests)

    async def sweep(self, digests: Collection[str]) -> list[str]:
        return await self._calls.once(StoreReplica.sweep, digests)

    async def gc(self, retention_s: float) -> Collected:
        return await self._calls.once(StoreReplica.gc, retention_s)

    async def fetch(self, digest: str, *, is_suspect: bool = False) -> Sequence[Buffer]:
        refs = await self._calls.over_object_store().once(StoreReplica.fetch, digest, is_suspect)
        return await asyncio.gather(*refs)

    def verify(self, tenant: str) -> AsyncGenerator[Verified]:
        return self._calls.stream(StoreReplica.verify, tenant)

    async def broadcast_release(self, digests: Collection[str], timeout_s: float) -> list[bool | BaseException]:
        return await self._calls.broadcast(timeout_s, StoreReplica.release, digests)

    async def _in_time(self, call: Callable[[], Awaitable[T]]) -> T:
        """Return the answer. Raises: StoreUnavailable if no replica answers within `wait_s`."""
        try:
            async with asyncio.timeout(self._wait_s):
                return await call()
        except TimeoutError as exc:
            raise StoreUnavailable(f"no replica answered within {self._wait_s:.0f} s") from exc


class RoutingClient(Protocol):
    """The calls that turn a request into a plan. Batch jobs implement them without Serve."""

    async def route(self, requests: Sequence[RouteRequest]) -> list[Route]: ...
    async def plan_named(
        self, tenant: str, choices: Sequence[tuple[str, float]], strategy: Strategy, min_generation: int = 0
    ) -> Plan: ...
    async def replay(
        self, tenant: str, strategy: Strategy, pinned: Sequence[PinnedAdapter], generation: int
    ) -> Plan: ...


class RetrieverCalls(RoutingClient, Protocol):
    """Calls that any one replica answers."""

    async def page(self, tenant: str, request: PageRequest, min_generation: int = 0) -> Page: ...
    async def map(self, tenant: str, min_generation: int = 0) -> PoolMap: ...
    async def place(self, tenant: str, text: str, names: Sequence[str], min_generation: int = 0) -> Place: ...
    async def vectors(self, tenant: str, texts: Sequence[str]) -> list[NDArray[np.float32]]: ...
    async def load(self, tenant: str) -> PoolSize: ...
    async def record(self, tenant: str, name: str, min_generation: int = 0) -> tuple[int, list[AdapterRecord]]: ...
    async def samples(self, tenant: str, name: str) -> list[Sample]: ...
    async def embed(self, groups: Sequence[Sequence[Sample]], tenants: Sequence[str]) -> list[Embedded | None]: ...
    async def accept(self, live: AdapterRecord, texts: Sequence[str]) -> Resampled: ...
    async def learn(self, tenant: str, outcomes: Sequence[Feedback]) -> Learnt: ...
    async def refit(self, model: str) -> str: ...
    def reindex(self, model: str, projection: str = "auto") -> AsyncIterator[ReindexStep]: ...
    def doctor(self, tenant: str) -> AsyncIterator[DoctorStep]: ...
    def regions(self, tenant: str) -> AsyncIterator[Region]: ...


class RetrieverReplica(RetrieverCalls, Protocol):
    """One replica of the Retriever deployment. Every replica must answer the calls below, not any one of them."""

    async def catch_up(self, generation: int) -> int: ...
    async def prepare_encoder(self, model: str, projection: str = "auto") -> str: ...


class RetrieverClient(RetrieverCalls, Protocol):
    """The Retriever deployment. Broadcasts return the answer or error of each replica.

    Broadcasts raise DeploymentUnavailableError if no replica runs, and TimeoutError if one does not answer in time.
    """

    def reindex(self, model: str, projection: str = "auto") -> AsyncGenerator[ReindexStep]: ...
    def doctor(self, tenant: str) -> AsyncGenerator[DoctorStep]: ...
    def regions(self, tenant: str) -> AsyncGenerator[Region]: ...
    async def broadcast_catch_up(self, generation: int, timeout_s: float) -> list[int | BaseException]: ...
    async def broadcast_prepare_encoder(
        self, model: str, timeout_s: float, projection: str = "auto"
    ) -> list[str | BaseException]: ...
    async def broadcast_load(self, tenant: str, timeout_s: float) -> list[PoolSize | BaseException]: ...


class ServeRetriever(RetrieverClient):
    """Calls the Retriever through Serve. All single calls are reads, and are repeated if their replica dies."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._calls: ServeCalls[RetrieverReplica] = ServeCalls(handle)

    async def route(self, requests: Sequence[RouteRequest]) -> list[Route]:
        return await self._calls.retry(RetrieverReplica.route, requests)

    async def plan_named(
        self, tenant: str, choices: Sequence[tuple[str, float]], strategy: Strategy, min_generation: int = 0
    ) -> Plan:
        return await self._calls.retry(RetrieverReplica.plan_named, tenant, choices, strategy, min_generation)

    async def replay(self, tenant: str, strategy: Strategy, pinned: Sequence[PinnedAdapter], generation: int) -> Plan:
        return await self._calls.retry(RetrieverReplica.replay, tenant, strategy, pinned, generation)

    async def page(self, tenant: str, request: PageRequest, min_generation: int = 0) -> Page:
        return await self._calls.retry(RetrieverReplica.page, tenant, request, min_generation)

    async def map(self, tenant: str, min_generation: int = 0) -> PoolMap:
        return await self._calls.retry(RetrieverReplica.map, tenant, min_generation)

    async def place(self, tenant: str, text: str, names: Sequence[str], min_generation: int = 0) -> Place:
        return await self._calls.retry(RetrieverReplica.place, tenant, text, names, min_generation)

    async def vectors(self, tenant: str, texts: Sequence[str]) -> list[NDArray[np.float32]]:
        return await self._calls.retry(RetrieverReplica.vectors, tenant, texts)

    async def load(self, tenant: str) -> PoolSize:
        return await self._calls.retry(RetrieverReplica.load, tenant)

    async def record(self, tenant: str, name: str, min_generation: int = 0) -> tuple[int, list[AdapterRecord]]:
        return await self._calls.retry(RetrieverReplica.record, tenant, name, min_generation)

    async def accept(self, live: AdapterRecord, texts: Sequence[str]) -> Resampled:
        return await self._calls.retry(RetrieverReplica.accept, live, texts)

    async def learn(self, tenant: str, outcomes: Sequence[Feedback]) -> Learnt:
        return await self._calls.retry(RetrieverReplica.learn, tenant, outcomes)

    async def samples(self, tenant: str, name: str) -> list[Sample]:
        return await self._calls.retry(RetrieverReplica.samples, tenant, name)

    async def embed(self, groups: Sequence[Sequence[Sample]], tenants: Sequence[str]) -> list[Embedded | None]:
        return await self._calls.retry(RetrieverReplica.embed, groups, tenants)

    async def refit(self, model: str) -> str:
        return await self._calls.once(RetrieverReplica.refit, model)

    def reindex(self, model: str, projection: str = "auto") -> AsyncGenerator[ReindexStep]:
        return self._calls.stream(RetrieverReplica.reindex, model, projection)

    def doctor(self, tenant: str) -> AsyncGenerator[DoctorStep]:
        return self._calls.stream(RetrieverReplica.doctor, tenant)

    def regions(self, tenant: str) -> AsyncGenerator[Region]:
        return self._calls.stream(RetrieverReplica.regions, tenant)

    async def broadcast_catch_up(self, generation: int, timeout_s: float) -> list[int | BaseException]:
        return await self._calls.broadcast(timeout_s, RetrieverReplica.catch_up, generation)

    async def broadcast_prepare_encoder(
        self, model: str, timeout_s: float, projection: str = "auto"
    ) -> list[str | BaseException]:
        return await self._calls.broadcast(timeout_s, RetrieverReplica.prepare_encoder, model, projection)

    async def broadcast_load(self, tenant: str, timeout_s: float) -> list[PoolSize | BaseException]:
        return await self._calls.broadcast(timeout_s, RetrieverReplica.load, tenant)
