"""An Ingress without Ray: a worker that says what a test scripts, a retriever over records, a store in memory."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from ray import serve

from deployments.config import AppConfig, WorkerSettings
from deployments.errors import SourceMissing
from deployments.figures import SERVE
from deployments.ingress import Ingress, app
from deployments.retriever import Embedded
from deployments.store import Verified
from deployments.uploads import FolderUpload
from gpu_worker.request import Delta, Job
from lora_store import (
    KEPT_VERSIONS,
    AdapterNotFound,
    AdapterRecord,
    AdapterRef,
    AdapterRefused,
    BlobCheck,
    Collected,
    Embedding,
    EncoderIncomplete,
    Key,
    Plan,
    PlannedAdapter,
    PoolShare,
    PublicNameTaken,
    Sample,
    Snapshot,
    Staged,
    Standing,
    Strategy,
    Visibility,
    Withdrawn,
)
from retriever_svc import (
    Candidate,
    DoctorStep,
    Found,
    Page,
    PageRequest,
    PinnedAdapter,
    ReindexStep,
    Route,
    RouteRequest,
)
from retriever_svc.listing import page
from retriever_svc.paging import page_of
from retriever_svc.planning import named_plan, replayed_plan
from tests.fakes import FakeHandle

BASE = "tiny-base"
ENCODER = "fake-encoder"
DELTAS = (Delta("Hel", 5, 1), Delta("lo", 5, 2), Delta("", 5, 3, "stop"))
SHAPES = {"model.layers.0.mlp.up_proj": (8, 6)}


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def adapter(
    name: str,
    *,
    version: str = "",
    template: str | None = None,
    samples: bool = True,
    generation: int = 1,
    tenant: str = "local",
    visibility: Visibility = "public",
) -> AdapterRecord:
    """A record as the catalogue would hold it; another `version` is another digest and other weights."""
    vector = np.array([1.0, 0.0], np.float32)
    return AdapterRecord(
        ref=AdapterRef(tenant, name, digest_of(f"version {name} {version}")),
        weights_digest=digest_of(f"weights {name} {version}"),
        samples_digest=digest_of(f"samples {name}") if samples else None,
        visibility=visibility,
        tags=(version,) if version else (),
        base_model=BASE,
        ranks=(2, 4),
        target_modules=("q_proj",),
        num_bytes=9,
        num_samples=2 if samples else 0,
        template=template,
        embedding=Embedding(ENCODER, vector, vector) if samples else None,
        probe_shift=0.5,
        source=name,
        actor="tester",
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        generation=generation,
    )


POOL = (adapter("poet"), adapter("coder", template="chat"))


@dataclass
class FakeWorker:
    """Streams `events`, raising where one is an exception; a probe gives `shifts` by adapter name, 0.5 by default.

    `forgets`: what it answers when asked to forget, in turn; then True.
    """

    events: Sequence[Delta | Exception] = DELTAS
    shifts: dict[str, float | Exception] = field(default_factory=dict)
    forgets: list[bool | Exception] = field(default_factory=list)
    failure: Exception | None = None  # what a probe raises

    async def stream(self, job: Job) -> AsyncIterator[Delta]:
        for event in self.events:
            yield _given(event)

    async def probe_many(self, weights_digests: Sequence[str]) -> list[float | Exception]:
        if self.failure is not None:
            raise self.failure
        by_digest = {digest_of(f"weights {name} "): shift for name, shift in self.shifts.items()}
        return [by_digest.get(digest, 0.5) for digest in weights_digests]

    async def module_shapes(self) -> dict[str, tuple[int, int]]:
        return SHAPES

    async def forget(self, weights_digests: Collection[str]) -> bool:
        return _given(self.forgets.pop(0)) if self.forgets else True


@dataclass
class FakeRetriever:
    """Routes every prompt to all of `held`, half as sure of each next one; `failure` is raised instead."""

    held: Sequence[AdapterRecord] = POOL
    failure: Exception | None = None
    caught_up: Exception | None = None
    abstains: bool = False
    unfit: Exception | None = None  # what embedding raises
    encoder: str = ENCODER
    steps: list[list[ReindexStep | DoctorStep | Exception]] = field(default_factory=list)  # of each job, in turn
    prepared: Exception | str = "other-encoder"

    async def route(self, request: RouteRequest) -> Route:
        if self.failure is not None:
            raise self.failure
        scored = [(record, 0.5**place) for place, record in enumerate(self.held)]
        candidates = tuple(Candidate(record.ref, score) for record, score in scored)
        if self.abstains:
            return Route(Plan("base", generation=7), candidates, 7, abstained=True)
        rows = tuple(PlannedAdapter(record.ref, record.weights_digest, 0.5, score) for record, score in scored)
        return Route(Plan("mixture", rows, 7), candidates, 7, abstained=False)

    async def plan_named(
        self, tenant: str, choices: Sequence[tuple[str, float]], strategy: Strategy, min_generation: int = 0
    ) -> Plan:
        return named_plan(self._snapshot, tenant, choices, strategy)

    async def replay(self, tenant: str, strategy: Strategy, pinned: Sequence[PinnedAdapter], generation: int) -> Plan:
        return replayed_plan(self._snapshot, tenant, strategy, pinned, generation)

    async def page(self, tenant: str, request: PageRequest) -> Page:
        return page(self._snapshot, tenant, request)

    async def records(self, tenant: str) -> tuple[int, list[AdapterRecord]]:
        return 7, self._snapshot.visible_to(tenant)

    async def find(self, tenant: str, words: str, start: int, num_wanted: int, min_generation: int = 0) -> Found:
        return page_of(self._snapshot, tenant, words, start, num_wanted)

    async def load(self, tenant: str) -> tuple[int, int]:
        return 7, len(self._snapshot.visible_to(tenant))

    async def count(self) -> tuple[int, int]:
        return 7, len(self.held)

    async def record(self, tenant: str, name: str) -> tuple[int, list[AdapterRecord]]:
        record = self._snapshot.resolve(tenant, name)
        return 7, [record, adapter(record.ref.name, version="older", generation=0)]

    async def embed(self, groups: Sequence[Sequence[Sample]], tenants: Sequence[str]) -> list[Embedded | None]:
        assert len(groups) == len(tenants)
        if self.unfit is not None:
            raise self.unfit
        near = (Candidate(POOL[0].ref, 0.25),)
        vector = np.array([1.0, 0.0], np.float32)
        return [Embedded(Embedding(self.encoder, vector, vector), near) if group else None for group in groups]

    async def catch_up(self, generation: int) -> int:
        if self.caught_up is not None:
            raise self.caught_up
        return generation

    async def reindex(self, model: str) -> AsyncIterator[ReindexStep]:
        for step in self.steps.pop(0):
            yield _given(step)

    async def doctor(self, tenant: str) -> AsyncIterator[DoctorStep]:
        for step in self.steps.pop(0):
            yield _given(step)

    async def prepare_encoder(self, model: str) -> str:
        return _given(self.prepared)

    @property
    def _snapshot(self) -> Snapshot:
        return Snapshot(7, {(record.ref.tenant, record.ref.name): record for record in self.held})


@dataclass
class FakeStore:
    """The pool in memory, at generation 7. An adapter's name says what it is: `bad…` refused, `bare…` without samples,
    `gone…` not there, `taken…` another tenant's. Its first tag makes it another version.

    `failing`: exceptions by method name, each raised as often as its number says.
    """

    live: dict[Key, tuple[AdapterRecord, ...]] = field(default_factory=dict)
    failing: dict[str, tuple[Exception, int]] = field(default_factory=dict)
    generation: int = 7
    held: list[Staged] = field(default_factory=list)  # staged, and neither committed nor discarded
    swept: list[str] = field(default_factory=list)
    encoder: str | None = None  # the identity of the one a reindex activated
    incomplete: list[EncoderIncomplete] = field(default_factory=list)  # what activations raise, in turn
    _holds: Iterator[int] = field(default_factory=itertools.count)

    async def stage(self, upload: FolderUpload, module_shapes: object) -> Staged:
        self._fail("stage")
        name = upload.adapter_name
        if name.startswith("bad"):
            raise AdapterRefused(name, ["it is bad"])
        if name.startswith("gone"):
            raise SourceMissing(name)
        version = upload.tags[0] if upload.tags else ""
        record = adapter(name, version=version, samples=not name.startswith("bare"), tenant=upload.tenant)
        record = replace(record, visibility=upload.visibility or upload.default_visibility)
        staged = self._hold(replace(record, embedding=None, template=upload.template))
        return replace(staged, keeps_visibility=upload.visibility is None)

    async def restage(self, record: AdapterRecord) -> Staged:
        self._fail("restage")
        return self._hold(record)

    async def commit(
        self,
        staged: Sequence[Staged],
        embeddings: Sequence[Embedding | None],
        shifts: Sequence[float | None],
        actor: str,
        standing: Standing = "any",
        share: PoolShare | None = None,
    ) -> int:
        self._fail("commit")
        if standing == "kept" and any(item.ref not in self._kept(item.ref) for item in staged):
            raise AdapterNotFound(staged[0].ref.name)
        for item in staged:
            if item.ref.name.startswith("taken"):
                raise PublicNameTaken(item.ref.name, ["the public name belongs to another tenant"])
        self.generation += 1
        for item, embedding in zip(staged, embeddings, strict=True):
            if standing == "live" and self._kept(item.ref)[:1] != [item.ref]:
                continue
            record = replace(item.record, generation=self.generation, embedding=embedding)
            older = [old for old in self.live.get(_key_of(record), ()) if old.ref != record.ref]
            self.live[_key_of(record)] = (record, *older)[:KEPT_VERSIONS]
        holds = {item.hold for item in staged}
        self.held = [item for item in self.held if item.hold not in holds]
        return self.generation

    async def discard(self, staged: Sequence[Staged]) -> None:
        self._fail("discard")
        holds = {item.hold for item in staged}
        assert holds <= {item.hold for item in self.held}
        self.held = [item for item in self.held if item.hold not in holds]

    async def withdraw(self, tenant: str, names: Sequence[str], actor: str) -> Withdrawn:
        self._fail("withdraw")
        for name in names:
            if (tenant, name) not in self.live:
                raise AdapterNotFound(name)
        self.generation += 1
        return Withdrawn(self.generation, tuple(old for name in names for old in self.live.pop((tenant, name))))

    async def set_visibility(self, tenant: str, name: str, visibility: Visibility, actor: str) -> int:
        self._fail("set_visibility")
        kept = self.live.get((tenant, name))
        if kept is None:
            raise AdapterNotFound(name)
        self.generation += 1
        self.live[tenant, name] = (replace(kept[0], visibility=visibility), *kept[1:])
        return self.generation

    async def approve(self, refs: Sequence[AdapterRef], actor: str) -> int:
        self._fail("approve")
        self.generation += 1
        for ref in refs:
            [first, *older] = self.live[ref.tenant, ref.name]
            self.live[ref.tenant, ref.name] = (replace(first, approved=True), *older)
        return self.generation

    async def add_embeddings(self, embeddings: Mapping[AdapterRef, Embedding]) -> int:
        self._fail("add_embeddings")
        self.generation += 1
        return self.generation

    async def activate_encoder(self, model: str, identity: str, actor: str) -> int:
        if self.incomplete:
            raise self.incomplete.pop(0)
        self.encoder = identity
        self.generation += 1
        return self.generation

    async def active_encoder(self) -> str | None:
        self._fail("active_encoder")
        return self.encoder

    async def versions(self, keys: Collection[Key]) -> dict[Key, tuple[AdapterRecord, ...]]:
        self._fail("versions")
        return {key: self.live[key] for key in keys if key in self.live}

    async def unreferenced(self, digests: Collection[str]) -> list[str]:
        self._fail("unreferenced")
        needed = {digest for kept in self.live.values() for record in kept for digest in record.blobs}
        return sorted(set(digests) - needed)

    async def sweep(self, digests: Collection[str]) -> list[str]:
        self._fail("sweep")
        self.swept += digests
        return list(digests)

    async def release(self, digests: Collection[str]) -> bool:
        return True

    async def gc(self, retention_s: float) -> Collected:
        self._fail("gc")
        return Collected(3, 12)

    async def verify(self) -> AsyncIterator[Verified]:
        self._fail("verify")
        checks = [BlobCheck(digest_of("a"), POOL[0].ref, None), BlobCheck(digest_of("b"), POOL[1].ref, "is missing")]
        for number, check in enumerate(checks, start=1):
            yield Verified(number, len(checks), check)

    async def samples(self, digests: Sequence[str]) -> list[tuple[Sample, ...]]:
        self._fail("samples")
        return [(Sample("one"), Sample("two")) for _ in digests]

    def _kept(self, ref: AdapterRef) -> list[AdapterRef]:
        return [record.ref for record in self.live.get((ref.tenant, ref.name), ())]

    def _hold(self, record: AdapterRecord) -> Staged:
        samples = (Sample("one"), Sample("two")) if record.samples_digest else ()
        staged = Staged(record, samples, f"hold-{next(self._holds)}")
        self.held.append(staged)
        return staged

    def _fail(self, method: str) -> None:
        if method in self.failing:
            error, times = self.failing.pop(method)
            if times > 1:
                self.failing[method] = error, times - 1
            raise error


def pool_of(*records: AdapterRecord) -> dict[Key, tuple[AdapterRecord, ...]]:
    """What a FakeStore holds: records of one name are its versions, the live one first."""
    live: dict[Key, tuple[AdapterRecord, ...]] = {}
    for record in records:
        live[_key_of(record)] = (*live.get(_key_of(record), ()), record)
    return live


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
    retrievers: Sequence[FakeRetriever] = (),
    engine: WorkerSettings | None = None,
    worker_grace_s: float = 5.0,
    kinds: Any = SERVE,
    **settings: Any,
) -> Served:
    """The Ingress as its replica holds it, but for Serve's wrapper. To be called in a running event loop.

    `engine`: what the config says of the Worker's; `kinds`: of metrics.
    """
    handles = [
        FakeHandle(*(retrievers or [retriever or FakeRetriever()])),
        FakeHandle(worker or FakeWorker()),
        FakeHandle(store or FakeStore(pool_of(*POOL))),
    ]
    config = config_of(worker=engine or WorkerSettings(), **settings)
    return Served(Ingress.__bases__[0](config, *handles, worker_grace_s=worker_grace_s, kinds=kinds), *handles)


@asynccontextmanager
async def http_of(
    served: Served, *, host: str = "127.0.0.1", raise_app_exceptions: bool = False, headers: Mapping[str, str] = {}
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the routes. They get their Ingress from Serve's replica context, which takes no other injection."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=raise_app_exceptions, client=(host, 50000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(servable_object=served.ingress))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            yield client


def _key_of(record: AdapterRecord) -> Key:
    return record.ref.tenant, record.ref.name


def _given(event: Any) -> Any:
    if isinstance(event, Exception):
        raise event
    return event
