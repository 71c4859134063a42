"""An Ingress without Ray, over a worker, a retriever and a store that are fakes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ray import serve

from deployments.config.app import AppConfig, WorkerSettings
from deployments.ingress import Ingress, app
from deployments.observability.metrics import SERVE
from gpu_worker.request.request import Job
from tests.deployments.adapter_records import BASE, POOL, pool_of
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.fake_store import FakeStore
from tests.deployments.fake_worker import FakeWorker
from tests.fakes import FakeHandle


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
    """Return settings under which the client of `http_of` is answered: it asks for the host `test`."""
    return AppConfig(**{"base_model": "somewhere/" + BASE, "allowed_hosts": ("test",), **changes})


def serve_plainly(
    *,
    worker: FakeWorker | None = None,
    retriever: FakeRetriever | None = None,
    store: FakeStore | None = None,
    retrievers: Sequence[FakeRetriever] = (),
    engine: WorkerSettings | None = None,
    worker_grace_s: float = 5.0,
    silence_s: float = 30.0,
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
    ingress = Ingress.__bases__[0](config, *handles, worker_grace_s=worker_grace_s, silence_s=silence_s, kinds=kinds)
    return Served(ingress, *handles)


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
