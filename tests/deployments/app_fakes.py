"""An Ingress without Ray: a worker that says what a test scripts, a retriever over records, a store that keeps both."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ray import serve

from deployments.config import AppConfig
from deployments.ingress import Ingress, app
from deployments.retriever import Embedded
from deployments.store import FolderUpload
from gpu_worker.request import Delta, Job
from lora_store import AdapterRecord, AdapterRef, AdapterRefused, Plan, PlannedAdapter, Sample, Staged, Strategy
from retriever_svc import Candidate, Route, RouteRequest
from retriever_svc.planning import named_plan
from tests.fakes import FakeHandle
from tests.retriever_svc.pool_fakes import digest_of, record_of, snapshot_of

BASE = "tiny-base"
DELTAS = (Delta("Hel", 5, 1), Delta("lo", 5, 2), Delta("", 5, 3, "stop"))
POOL = (record_of("poet", (1.0, 0.0)), record_of("coder", (0.0, 1.0), template="chat"))


@dataclass
class FakeWorker:
    """Streams `events`, raising where one is an exception; a probe gives `shifts` by weights digest, 0.5 by default."""

    events: Sequence[Delta | Exception] = DELTAS
    shifts: dict[str, float | Exception] = field(default_factory=dict)

    async def stream(self, job: Job) -> AsyncIterator[Delta]:
        for event in self.events:
            yield _given(event)

    async def probe(self, weights_digest: str) -> float:
        return _given(self.shifts.get(weights_digest, 0.5))

    async def module_shapes(self) -> dict[str, tuple[int, int]]:
        return {"model.layers.0.mlp.up_proj": (8, 6)}


@dataclass
class FakeRetriever:
    """Routes every prompt to all of `records`, half as sure of each next one; `failure` is raised instead."""

    records_held: Sequence[AdapterRecord] = POOL
    failure: Exception | None = None
    caught_up: Exception | None = None
    abstains: bool = False

    async def route(self, request: RouteRequest) -> Route:
        if self.failure is not None:
            raise self.failure
        scored = [(record, 0.5**place) for place, record in enumerate(self.records_held)]
        candidates = tuple(Candidate(record.ref, score) for record, score in scored)
        if self.abstains:
            return Route(Plan("base", generation=7), candidates, 7, abstained=True)
        rows = tuple(PlannedAdapter(record.ref, record.weights_digest, 0.5, score) for record, score in scored)
        return Route(Plan("mixture", rows, 7), candidates, 7, abstained=False)

    async def plan_named(self, tenant: str, choices: Sequence[tuple[str, float]], strategy: Strategy) -> Plan:
        return named_plan(snapshot_of(*self.records_held), tenant, choices, strategy)

    async def records(self, tenant: str) -> tuple[int, list[AdapterRecord]]:
        return 7, snapshot_of(*self.records_held).visible_to(tenant)

    async def embed(self, groups: Sequence[Sequence[Sample]]) -> tuple[str, list[Embedded | None]]:
        near = (Candidate(POOL[0].ref, 0.25),)
        return "fake-encoder", [Embedded((float(len(group)), 0.0), near) if group else None for group in groups]

    async def catch_up(self, generation: int) -> int:
        if self.caught_up is not None:
            raise self.caught_up
        return generation


@dataclass
class FakeStore:
    """Stages a folder by its name: `bad…` is refused, `bare…` has no samples. `commit` gives generation 8."""

    failure: Exception | None = None
    num_failures: int = 1_000_000

    async def stage(self, upload: FolderUpload, module_shapes: object) -> Staged:
        name = upload.name or upload.path.name
        if name.startswith("bad"):
            raise AdapterRefused(name, ["it is bad"])
        record = record_of(name, None)
        record = replace(record, ref=AdapterRef(upload.tenant, name, digest_of(name)))
        return Staged(record, () if name.startswith("bare") else (Sample("one"), Sample("two")))

    async def live(self, refs: Sequence[AdapterRef]) -> dict[AdapterRef, AdapterRecord]:
        """Names that begin with `live` are live already, since generation 3."""
        records = {ref: replace(record_of(ref.name, None), ref=ref, generation=3) for ref in refs}
        return {ref: record for ref, record in records.items() if ref.name.startswith("live")}

    async def commit(self, staged: Sequence[Staged], *_: object) -> int:
        if self.failure is not None and self.num_failures:
            self.num_failures -= 1
            raise self.failure
        return 8


@dataclass
class Served:
    """An Ingress and the handles it was given."""

    ingress: Any
    retriever: FakeHandle
    worker: FakeHandle
    store: FakeHandle

    @property
    def job(self) -> Job:
        """The one job the worker got."""
        [(job,)] = self.worker.called("stream")
        assert isinstance(job, Job)
        return job


def config_of(**changes: Any) -> AppConfig:
    return AppConfig(base_model="somewhere/" + BASE, **changes)


def serve_plainly(
    *,
    worker: FakeWorker | None = None,
    retriever: FakeRetriever | None = None,
    store: FakeStore | None = None,
    **settings: Any,
) -> Served:
    """The Ingress as its replica holds it, but for Serve's wrapper. To be called in a running event loop."""
    handles = [
        FakeHandle(retriever or FakeRetriever()),
        FakeHandle(worker or FakeWorker()),
        FakeHandle(store or FakeStore()),
    ]
    return Served(Ingress.__bases__[0](config_of(**settings), *handles), *handles)


@asynccontextmanager
async def http_of(
    served: Served, *, host: str = "127.0.0.1", raise_app_exceptions: bool = False
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the routes. They get their Ingress from Serve's replica context, which takes no other injection."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=raise_app_exceptions, client=(host, 50000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(servable_object=served.ingress))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


def _given(event: Any) -> Any:
    if isinstance(event, Exception):
        raise event
    return event
