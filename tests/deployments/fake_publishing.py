"""A Publisher over fakes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from deployments.api.adapters import PublishItem
from deployments.api.responses import Published, Settled
from deployments.background import Background
from deployments.calls.catalogue_clients import serve_retriever, serve_store
from deployments.calls.worker_client import BaseWorkers, WorkerClient, Workers, serve_worker
from deployments.observability.request_metrics import ChangeMetrics
from deployments.publishing.publisher import Publisher
from deployments.publishing.reclaimer import Reclaimer
from gpu_worker.errors import AdapterUnfit
from lora_store import LOCAL_TENANT, AdapterRecord
from tests.deployments.adapter_records import BASE, pool_of
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.fake_store import FakeStore
from tests.deployments.fake_worker import FakeWorker
from tests.fakes import FakeHandle

OF_STORE = {
    "refused": ("bad", "bad-1", "bad-2"),
    "missing": ("gone",),
    "without_samples": ("bare",),
    "taken": ("taken",),
}
SHIFTS: dict[str, float | Exception] = {"mute": 0.0, "wrong": AdapterUnfit("it is for another base"), "bare": 0.25}
POET = ("local", "poet")


async def _in_no_time(delay_s: float) -> None:
    await asyncio.sleep(0)


class Publishing:
    """A Publisher over fakes, and its handles. A call returns when its background work has ended."""

    def __init__(
        self,
        *live: AdapterRecord,
        retriever: FakeHandle | None = None,
        failing: dict[str, Any] | None = None,
        dying: dict[str, int] | None = None,
    ) -> None:
        self.pool = FakeStore(pool_of(*live), dict(failing or {}), dict(dying or {}), **OF_STORE)
        self.store = FakeHandle(self.pool)
        self.retriever = retriever or FakeHandle(FakeRetriever())
        self.worker = FakeHandle(FakeWorker(shifts=SHIFTS))
        self.workers: dict[str, BaseWorkers] = {}  # of further base models

    def __call__(self, *names: str, version: str = "") -> list[Published | Exception]:
        tags = (version,) if version else ()
        uploads = [PublishItem(Path("folders", name), tags=tags) for name in names]
        outcomes: list[Published | Exception] = self.run(lambda publisher: publisher.publish(uploads, "tester"))
        return outcomes

    def rollback(self, digest: str | None = None, name: str = "poet") -> Published:
        published: Published = self.run(lambda publisher: publisher.rollback((LOCAL_TENANT, name), digest, "tester"))
        return published

    def withdraw(self, *names: str) -> Settled:
        removed: Settled = self.run(lambda publisher: publisher.withdraw(LOCAL_TENANT, names, "tester"))
        return removed

    def run(self, change: Callable[[Publisher], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            background = Background()
            try:
                return await change(self.publisher(background))
            finally:
                await background.idle()

        return asyncio.run(run())

    def publisher(self, background: Background) -> Publisher:
        store, worker = serve_store(self.store), serve_worker(self.worker)
        workers = workers_of(worker, **self.workers)
        reclaimer = Reclaimer(store, workers, background, longest_request_s=1, sleep=_in_no_time)
        return Publisher(
            store,
            serve_retriever(self.retriever),
            workers,
            background=background,
            reclaimer=reclaimer,
            metrics=ChangeMetrics(),
        )

    @property
    def live_digests(self) -> dict[str, list[str]]:
        return {name: [record.ref.digest for record in kept] for (_, name), kept in self.pool.live.items()}


def workers_of(client: WorkerClient, **others: BaseWorkers) -> Workers:
    """Return the workers of one base model, which never scale to zero, and these others."""
    return Workers({BASE: BaseWorkers(client, None), **others})


def live(outcomes: Sequence[Published | Exception]) -> list[Published]:
    return [outcome for outcome in outcomes if isinstance(outcome, Published)]
