"""An Ingress without Ray, over a fake worker, retriever and store."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx
from fastapi import APIRouter, FastAPI
from starlette.types import ASGIApp

from deployments.auth.authenticator import Authenticator
from deployments.config.app import AppConfig
from deployments.http.api import build_api
from deployments.http.bodies import MAX_BODY_TOTAL_BYTES
from deployments.http.dependencies import Services
from deployments.http.middleware import RequestContextMiddleware
from deployments.ingress import Ingress
from deployments.observability.metrics import SERVE
from deployments.observability.request_metrics import RequestMetrics
from deployments.observability.usage import UsageLog
from gpu_worker.config import NativeSettings
from gpu_worker.front.request.request import Job
from tests.deployments.adapter_records import BASE, POOL, pool_of
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.fake_store import FakeStore
from tests.deployments.fake_worker import FakeWorker
from tests.deployments.metric_fakes import FakeMetrics
from tests.fakes import FakeHandle

_CACHE = tempfile.mkdtemp()  # no test writes into the user's


@dataclass
class Served:
    """An Ingress and its handles."""

    ingress: Ingress
    retriever: FakeHandle
    worker: FakeHandle
    store: FakeHandle

    @property
    def services(self) -> Services:
        return self.ingress.services

    @property
    def job(self) -> Job:
        """Return the single job that the worker received."""
        [(job,)] = self.worker.called("stream")
        assert isinstance(job, Job)
        return job


def config_of(**changes: Any) -> AppConfig:
    """Return settings that allow the host `test`, which the client of `http_of` uses."""
    plain = {"base_model": "somewhere/" + BASE, "allowed_hosts": ("test",), "cache_dir": _CACHE}
    return AppConfig(**{**plain, **changes})


def serve_plainly(
    *,
    worker: FakeWorker | None = None,
    retriever: FakeRetriever | None = None,
    store: FakeStore | None = None,
    retrievers: Sequence[FakeRetriever] = (),
    engine: NativeSettings | None = None,
    worker_grace_s: float = 5.0,
    silence_s: float = 30.0,
    keep_alive_s: float = 10.0,
    kinds: Any = SERVE,
    max_body_total_bytes: int = MAX_BODY_TOTAL_BYTES,
    **settings: Any,
) -> Served:
    """Return an Ingress without Serve's wrapper. Call this in a running event loop.

    `engine`: changes of the Worker's settings; `kinds`: kinds of metrics.
    """
    replicas = retrievers or [retriever or FakeRetriever()]
    outcomes: dict[str, Any] = {"refused": ("bad", "bad-one"), "missing": ("gone",), "taken": ("taken",)}
    handles = [
        FakeHandle(*replicas),
        FakeHandle(worker or FakeWorker()),
        FakeHandle(store or FakeStore(pool_of(*POOL), model_names=replicas[0].model_names, **outcomes)),
    ]
    config = config_of(worker=engine or NativeSettings(), **settings)
    retriever_handle, worker_handle, store_handle = handles
    ingress = Ingress(
        config,
        retriever_handle,
        dict.fromkeys(config.by_model, worker_handle),
        store_handle,
        silence_s=silence_s,
        grace_s=worker_grace_s,
        keep_alive_s=keep_alive_s,
        kinds=kinds,
        max_body_total_bytes=max_body_total_bytes,
    )
    return Served(ingress, *handles)


def app_of(served: Served) -> FastAPI:
    """Return the application over the services of `served`."""
    app = build_api(served.services)
    app.router = _router()
    return app


@asynccontextmanager
async def http_of(
    served: Served, *, host: str = "127.0.0.1", raise_app_exceptions: bool = False, headers: Mapping[str, str] = {}
) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of the application over the services of `served`."""
    transport = httpx.ASGITransport(app_of(served), raise_app_exceptions=raise_app_exceptions, client=(host, 50000))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
        yield client


@cache
def _router() -> APIRouter:
    """Return the routes of an application, which hold no services: a request finds those of its own application.

    All applications of the tests share them, as FastAPI (0.165) makes the schemas of each one's routes again, which
    takes longer than a test.
    """
    with ThreadPoolExecutor(1) as thread:  # the caller's has an event loop
        return thread.submit(app_over_fakes).result().router


def with_context(app: ASGIApp) -> ASGIApp:
    """Return `app` below the middleware that gives every request its context."""
    log = UsageLog(None, BASE, FakeStore().put_usage)
    return RequestContextMiddleware(app, Authenticator(None, 1), RequestMetrics(FakeMetrics()), log)


def app_over_fakes() -> FastAPI:
    """Return an application to read routes and the API description from. Its event loop has ended: it cannot answer."""

    async def build() -> FastAPI:
        served = serve_plainly()
        await served.services.preload.wait()
        return build_api(served.services)

    return asyncio.run(build())
