"""An application whose Store, catalogue, encoder, index and Ingress are real, and whose workers are not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from deployments.config.app import RetrievalSettings
from deployments.ingress import Ingress
from deployments.retriever import RetrieverDeployment
from deployments.store import StoreDeployment
from retriever_svc import IndexSettings
from tests.deployments.app_fakes import Served, config_of, http_of
from tests.deployments.console_fakes import CountingWorker
from tests.fakes import FakeHandle


@asynccontextmanager
async def real_app(
    folder: Path,
    workers: Mapping[str, FakeHandle] | None = None,
    *,
    index: IndexSettings | None = None,
    **settings: Any,
) -> AsyncIterator[tuple[httpx.AsyncClient, Served]]:
    """Yield a client after the preload. The pool is below `folder`; `workers` are those of each base model."""
    retrieval = RetrievalSettings(encoder_threads=1, min_score=-1.0)
    config = config_of(**{"store_uri": str(folder / "pool"), "retrieval": retrieval} | settings)
    retriever = RetrieverDeployment(config, index=index, poll_interval_s=3600.0)
    retriever._pools._background = lambda work: work()  # lists are trained before a publish is answered
    workers = workers or dict.fromkeys(config.by_model, FakeHandle(CountingWorker()))
    asked, store = FakeHandle(retriever), FakeHandle(StoreDeployment(config, put=lambda b: b))
    served = Served(Ingress(config, asked, dict(workers), store), asked, next(iter(workers.values())), store)
    try:
        await served.services.preload.wait()
        async with http_of(served) as client:
            yield client, served
        await served.services.background.idle()
    finally:
        retriever._polling.cancel()
