"""The Retriever as its callers see it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Protocol

from ray.serve.handle import DeploymentHandle

from deployments.calls.serve_calls import ServeCalls
from lora_store import AdapterRecord, Plan, Sample, Strategy
from retriever_svc import DoctorStep, Page, PageRequest, PinnedAdapter, Place, PoolMap, ReindexStep, Route, RouteRequest
from retriever_svc.embedded import Embedded


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
    """The calls that any one replica answers."""

    async def page(self, tenant: str, request: PageRequest, min_generation: int = 0) -> Page: ...
    async def map(self, tenant: str, min_generation: int = 0) -> PoolMap: ...
    async def place(self, tenant: str, text: str, names: Sequence[str], min_generation: int = 0) -> Place: ...
    async def load(self, tenant: str) -> tuple[int, int]: ...
    async def record(self, tenant: str, name: str, min_generation: int = 0) -> tuple[int, list[AdapterRecord]]: ...
    async def embed(self, groups: Sequence[Sequence[Sample]], tenants: Sequence[str]) -> list[Embedded | None]: ...
    def reindex(self, model: str) -> AsyncIterator[ReindexStep]: ...
    def doctor(self, tenant: str) -> AsyncIterator[DoctorStep]: ...


class RetrieverReplica(RetrieverCalls, Protocol):
    """One replica of the Retriever deployment. Every replica must answer the calls below, not any one of them."""

    async def catch_up(self, generation: int) -> int: ...
    async def prepare_encoder(self, model: str) -> str: ...


class RetrieverClient(RetrieverCalls, Protocol):
    """The Retriever deployment. Broadcasts return the answer or error of each replica.

    Broadcasts raise DeploymentUnavailableError if no replica runs, and TimeoutError if one does not answer in time.
    """

    def reindex(self, model: str) -> AsyncGenerator[ReindexStep]: ...
    def doctor(self, tenant: str) -> AsyncGenerator[DoctorStep]: ...
    async def broadcast_catch_up(self, generation: int, timeout_s: float) -> list[int | BaseException]: ...
    async def broadcast_prepare_encoder(self, model: str, timeout_s: float) -> list[str | BaseException]: ...
    async def broadcast_load(self, tenant: str, timeout_s: float) -> list[tuple[int, int] | BaseException]: ...


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

    async def load(self, tenant: str) -> tuple[int, int]:
        return await self._calls.retry(RetrieverReplica.load, tenant)

    async def record(self, tenant: str, name: str, min_generation: int = 0) -> tuple[int, list[AdapterRecord]]:
        return await self._calls.retry(RetrieverReplica.record, tenant, name, min_generation)

    async def embed(self, groups: Sequence[Sequence[Sample]], tenants: Sequence[str]) -> list[Embedded | None]:
        return await self._calls.retry(RetrieverReplica.embed, groups, tenants)

    def reindex(self, model: str) -> AsyncGenerator[ReindexStep]:
        return self._calls.stream(RetrieverReplica.reindex, model)

    def doctor(self, tenant: str) -> AsyncGenerator[DoctorStep]:
        return self._calls.stream(RetrieverReplica.doctor, tenant)

    async def broadcast_catch_up(self, generation: int, timeout_s: float) -> list[int | BaseException]:
        return await self._calls.broadcast(timeout_s, RetrieverReplica.catch_up, generation)

    async def broadcast_prepare_encoder(self, model: str, timeout_s: float) -> list[str | BaseException]:
        return await self._calls.broadcast(timeout_s, RetrieverReplica.prepare_encoder, model)

    async def broadcast_load(self, tenant: str, timeout_s: float) -> list[tuple[int, int] | BaseException]:
        return await self._calls.broadcast(timeout_s, RetrieverReplica.load, tenant)
