"""The clients of the Store and the Retriever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from ray.serve.handle import DeploymentHandle

from deployments.calls.typed_client import LONG_WAIT_S, WAIT_S, ServeClient, once, retry, stream
from deployments.json_types import JsonObject
from lora_store import (
    AdapterRecord,
    AdapterRef,
    Collected,
    Edit,
    Embedding,
    Feedback,
    Key,
    NamedPolicy,
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
from lora_store.adapter import Shapes
from lora_store.feedback import Kind
from lora_store.garbage_collection import Verified
from lora_store.usage import UsageQuery
from retriever_svc import (
    AskedPrompt,
    DoctorStep,
    Draws,
    IndexStats,
    Learnt,
    Page,
    PageRequest,
    PinnedAdapter,
    Place,
    PoolSize,
    Region,
    ReindexStep,
    Resampled,
    Route,
    RouteRequest,
)
from retriever_svc.route import Embedded

if TYPE_CHECKING:  # the requests' forms take a tenth of a second of a Worker
    from deployments.api.adapters import PublishItem

Buffer = NDArray[np.uint8]


class WeightsSource(Protocol):
    """The source of adapter weights for a Worker. Batch jobs implement it without Serve."""

    async def fetch(self, digest: str, *, is_suspect: bool = False) -> Sequence[Buffer]:
        """Return the canonical bytes of the weights in parts, which the caller hashes.

        `is_suspect`: their hash was wrong when they arrived before, so the stored file is hashed first.
        Raises: AdapterNotFound, BlobCorrupted, StoreUnavailable; an error of Ray if the replica or the bytes are lost.
        """
        ...


def _no_store() -> StoreUnavailable:
    return StoreUnavailable(f"no replica answered within {WAIT_S:.0f} s")


class StoreCalls(Protocol):
    """Calls that any one replica answers.

    Reads, stages and writes with a commit id are repeated if their replica dies. Other writes are sent once. The first
    call of each change is a read that ends with StoreUnavailable after a minute: a replica cannot start while its disk
    is away, and calls without a replica would wait for ever.
    """

    @retry(within_s=WAIT_S, late=_no_store)
    async def ping(self) -> None: ...
    @retry(within_s=WAIT_S, late=_no_store)
    async def active_encoder(self) -> str | None: ...
    @retry(within_s=WAIT_S, late=_no_store)
    async def versions(self, keys: Collection[Key]) -> dict[Key, tuple[AdapterRecord, ...]]: ...

    @retry
    async def stage(self, upload: PublishItem, shapes_by_model: Mapping[str, Shapes]) -> Staged: ...
    @retry
    async def restage(self, record: AdapterRecord) -> Staged: ...
    @retry
    async def take_over(self, staged: Sequence[Staged]) -> list[Staged]: ...
    @retry
    async def resample(self, live: AdapterRecord, samples: Sequence[Sample] | None) -> Staged: ...
    @retry
    async def edit(self, live: AdapterRecord, edit: Edit) -> Staged: ...
    @retry(within_s=WAIT_S)
    async def put_feedback(self, tenant: str, kind: Kind, feedback: Feedback) -> None: ...
    @retry(within_s=WAIT_S)
    async def asked(self, tenant: str, request_id: str) -> Feedback | None: ...
    @retry(within_s=WAIT_S)
    async def feedback(self, tenant: str, kind: Kind, adapter: str | None = None) -> list[Feedback]: ...
    @retry
    async def tenants_with_outcomes(self) -> list[str]: ...
    @retry(within_s=WAIT_S)
    async def delete_proposals(self, tenant: str, adapter: str, ids: Collection[str]) -> None: ...
    @retry
    async def put_usage(self, segment: str, lines: bytes) -> None: ...
    @retry(within_s=LONG_WAIT_S)
    async def usage(self, query: UsageQuery) -> list[JsonObject]: ...
    @retry(within_s=LONG_WAIT_S)
    async def put_part(self, upload: str, number: int, data: Buffer) -> None: ...
    @once
    async def delete_parts(self, uploads: Collection[str]) -> None: ...
    @retry(only_with="commit_id")
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
    @retry
    async def check_commit(self, staged: Sequence[Staged], quota: TenantQuota | None = None) -> None: ...
    @once
    async def discard(self, staged: Sequence[Staged]) -> None: ...
    @retry(only_with="commit_id")
    async def withdraw(
        self, tenant: str, names: Sequence[str], actor: str, commit_id: str | None = None
    ) -> Withdrawn: ...
    @retry(only_with="commit_id")
    async def expire(self, commit_id: str | None = None) -> Withdrawn: ...
    @once
    async def set_visibility(self, tenant: str, name: str, visibility: Visibility, actor: str) -> int: ...
    @once
    async def approve(self, refs: Sequence[AdapterRef], actor: str) -> int: ...
    @retry
    async def set_trial(self, tenant: str, name: str, trial: Trial | None, actor: str) -> int: ...
    @once
    async def set_name(self, key: Key, policy: str, actor: str) -> int: ...
    @once
    async def approve_name(self, ref: AdapterRef) -> int: ...
    @once
    async def add_embeddings(self, embeddings: Mapping[AdapterRef, Embedding]) -> int: ...
    @once
    async def rank(
        self,
        tenant: str,
        rankings: Sequence[Ranking],
        actor: str,
        are_outcomes: bool = False,
        keeps: Sequence[AdapterRef] = (),
    ) -> int: ...
    @once
    async def activate_encoder(self, model: str, identity: str, actor: str) -> int: ...
    @once
    async def unreferenced(self, digests: Collection[str]) -> list[str]: ...
    @once
    async def sweep(self, digests: Collection[str]) -> list[str]: ...
    @once
    async def gc(self, retention_s: float) -> Collected: ...
    @retry(within_s=LONG_WAIT_S)
    async def pool_state(self, tenant: str | None) -> bytes: ...
    @retry(within_s=LONG_WAIT_S)
    async def pool_part(self, tenant: str | None, name: str, number: int) -> bytes: ...
    @stream
    def verify(self, tenant: str) -> AsyncGenerator[Verified]: ...


class StoreReplica(StoreCalls, Protocol):
    """One replica of the Store deployment."""

    async def fetch(self, digest: str, is_suspect: bool = False) -> Sequence[Awaitable[Buffer]]: ...
    async def release(self, digests: Collection[str]) -> bool: ...


class StoreClient(StoreCalls, WeightsSource, Protocol):
    """The Store deployment."""

    async def broadcast_release(self, digests: Collection[str], timeout_s: float) -> list[bool | BaseException]:
        """Return the answer or error of each replica. Raises: DeploymentUnavailableError, TimeoutError."""
        ...


class ServeStore(ServeClient[StoreReplica], StoreClient):
    """Calls the Store through Serve."""

    async def fetch(self, digest: str, *, is_suspect: bool = False) -> Sequence[Buffer]:
        refs = await self.calls.once(StoreReplica.fetch, digest, is_suspect)
        return await asyncio.gather(*refs)

    async def broadcast_release(self, digests: Collection[str], timeout_s: float) -> list[bool | BaseException]:
        return await self.calls.broadcast(timeout_s, StoreReplica.release, digests)


def serve_store(handle: DeploymentHandle) -> StoreClient:
    """Return the client of a Store deployment."""
    return ServeStore(handle)  # type: ignore[abstract]  # the policies on `StoreCalls` implement its methods


class RoutingClient(Protocol):
    """The calls that turn a request into a plan. Batch jobs implement them without Serve."""

    @retry(within_s=LONG_WAIT_S)
    async def route(self, requests: Sequence[RouteRequest]) -> list[Route]: ...
    @retry(within_s=LONG_WAIT_S)
    async def plan_named(
        self, tenant: str, choices: Sequence[tuple[str, float]], strategy: Strategy, min_generation: int = 0
    ) -> Plan: ...
    @retry(within_s=LONG_WAIT_S)
    async def replay(
        self,
        tenant: str,
        strategy: Strategy,
        pinned: Sequence[PinnedAdapter],
        generation: int,
        min_generation: int = 0,
    ) -> Plan: ...
    @retry(within_s=LONG_WAIT_S)
    async def policies(self, tenant: str, model: str, min_generation: int = 0, limit: int = 1) -> list[NamedPolicy]: ...
    @retry(within_s=LONG_WAIT_S)
    async def find_model(
        self, tenant: str, model: str, strategy: Strategy, min_generation: int = 0
    ) -> NamedPolicy | Plan | None: ...


class RetrieverCalls(RoutingClient, Protocol):
    """Calls that any one replica answers: reads, which are repeated if their replica dies, except `refit`."""

    @retry(within_s=WAIT_S)
    async def page(self, tenant: str, request: PageRequest, min_generation: int = 0) -> Page: ...
    @retry(within_s=WAIT_S)
    async def names(
        self,
        tenant: str,
        min_generation: int = 0,
        after: str = "",
        limit: int | None = None,
        is_short: bool = False,
    ) -> list[NamedPolicy]: ...
    @retry(within_s=LONG_WAIT_S)
    async def map(self, tenant: str, min_generation: int = 0) -> bytes: ...
    @retry(within_s=LONG_WAIT_S)
    async def place(self, tenant: str, text: str, names: Sequence[str], min_generation: int = 0) -> Place: ...
    @retry(within_s=LONG_WAIT_S)
    async def vectors(self, tenant: str, texts: Sequence[str], model: str) -> list[NDArray[np.float32]]: ...
    @retry(within_s=WAIT_S)
    async def load(self, tenant: str) -> PoolSize: ...
    @retry(within_s=WAIT_S)
    async def index_stats(self) -> IndexStats: ...
    @retry(within_s=WAIT_S)
    async def record(self, tenant: str, name: str, min_generation: int = 0) -> tuple[int, list[AdapterRecord]]: ...
    @retry(within_s=WAIT_S)
    async def evaluation(self, tenant: str, name: str) -> Ranking | None: ...
    @retry(within_s=WAIT_S)
    async def samples(self, tenant: str, name: str, min_generation: int = 0) -> list[Sample]: ...
    @retry(within_s=LONG_WAIT_S)
    async def embed(self, groups: Sequence[Sequence[Sample]], tenants: Sequence[str]) -> list[Embedded | None]: ...
    @retry(within_s=LONG_WAIT_S)
    async def draws(self, tenant: str, name: str, min_generation: int = 0) -> Draws: ...
    @retry(within_s=LONG_WAIT_S)
    async def accept(self, live: AdapterRecord, texts: Sequence[str]) -> Resampled: ...
    @retry(within_s=LONG_WAIT_S)
    async def learn(self, tenant: str, outcomes: Sequence[Feedback]) -> Learnt: ...
    @once
    async def refit(self, model: str) -> str: ...
    @stream
    def reindex(self, model: str, projection: str = "auto") -> AsyncGenerator[ReindexStep]: ...
    @stream
    def doctor(self, tenant: str, prompts: Sequence[AskedPrompt] = ()) -> AsyncGenerator[DoctorStep]: ...
    @stream
    def regions(self, tenant: str) -> AsyncGenerator[Region]: ...


class RetrieverReplica(RetrieverCalls, Protocol):
    """One replica of the Retriever deployment. Every replica must answer the calls below, not any one of them."""

    async def catch_up(self, generation: int) -> int: ...
    async def prepare_encoder(self, model: str, projection: str = "auto") -> str: ...


class RetrieverClient(RetrieverCalls, Protocol):
    """The Retriever deployment. Broadcasts return the answer or error of each replica.

    Broadcasts raise DeploymentUnavailableError if no replica runs, and TimeoutError if one does not answer in time.
    """

    async def broadcast_catch_up(self, generation: int, timeout_s: float) -> list[int | BaseException]: ...
    async def broadcast_prepare_encoder(
        self, model: str, timeout_s: float, projection: str = "auto"
    ) -> list[str | BaseException]: ...
    async def broadcast_load(self, tenant: str, timeout_s: float) -> list[PoolSize | BaseException]: ...


class ServeRetriever(ServeClient[RetrieverReplica], RetrieverClient):
    """Calls the Retriever through Serve."""

    async def broadcast_catch_up(self, generation: int, timeout_s: float) -> list[int | BaseException]:
        return await self.calls.broadcast(timeout_s, RetrieverReplica.catch_up, generation)

    async def broadcast_prepare_encoder(
        self, model: str, timeout_s: float, projection: str = "auto"
    ) -> list[str | BaseException]:
        return await self.calls.broadcast(timeout_s, RetrieverReplica.prepare_encoder, model, projection)

    async def broadcast_load(self, tenant: str, timeout_s: float) -> list[PoolSize | BaseException]:
        return await self.calls.broadcast(timeout_s, RetrieverReplica.load, tenant)


def serve_retriever(handle: DeploymentHandle) -> RetrieverClient:
    """Return the client of a Retriever deployment."""
    return ServeRetriever(handle)  # type: ignore[abstract]  # the policies on `RetrieverCalls` implement its methods
