"""The Retriever deployment without Serve, on a real catalogue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from deployments.config.app import AppConfig, RetrievalSettings
from deployments.retriever import RetrieverDeployment
from lora_store import AdapterRecord, Embedding, Sample
from lora_store.blobs import BlobStore
from lora_store.catalogue import Catalogue
from lora_store.events import Event, Publish
from lora_store.location import Location
from lora_store.sample_files import write_samples
from retriever_svc import PageRequest
from tests.retriever_svc.pool_fakes import BASE, record_of

SAMPLES = {
    "german": [Sample("Translate to German: good morning."), Sample("How do you say cheese in German?")],
    "sums": [Sample("What is 3 + 4?"), Sample("Add 12 and 30.")],
}
ALL = PageRequest(100)


class Ticks:
    """A sleep that ends when the test says so, after the previous sleeper has finished its work."""

    def __init__(self) -> None:
        self.intervals_s: list[float] = []
        self._asleep, self._wake = asyncio.Event(), asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        self.intervals_s.append(seconds)
        self._asleep.set()
        await self._wake.wait()
        self._wake.clear()

    async def tick(self) -> None:
        """Let one interval pass, and wait for its work."""
        await self._asleep.wait()
        self._asleep.clear()
        self._wake.set()
        await self._asleep.wait()


class Served:
    """A replica, the catalogue it reads, and its clock."""

    def __init__(self, folder: Path) -> None:
        self.uri, self.ticks = str(folder), Ticks()
        self.catalogue = Catalogue(Location(self.uri).child("catalogue"))
        retrieval = RetrievalSettings(encoder_threads=1)
        config = AppConfig(store_uri=self.uri, accepts_base=(BASE,), retrieval=retrieval)
        self.replica = RetrieverDeployment(config, sleep=self.ticks.sleep, poll_interval_s=7.0)

    def publish(self, *records: AdapterRecord) -> int:
        events: list[Event] = [Publish(record) for record in records]
        return self.catalogue.commit(lambda snapshot: events)

    async def embedded(self, *names: str) -> list[AdapterRecord]:
        """Return records as a publish commits them, with their samples in the store."""
        found = await self.replica.embed([SAMPLES[name] for name in names], ["local"] * len(names))
        return [self._record(name, item.embedding) for name, item in zip(names, found, strict=True) if item is not None]

    def _record(self, name: str, embedding: Embedding) -> AdapterRecord:
        digest = BlobStore(Location(self.uri).child("blobs")).put(write_samples(SAMPLES[name]))
        return replace(record_of(name, None), samples_digest=digest, num_samples=2, embedding=embedding)

    @property
    def pools(self) -> Any:
        return self.replica._pools


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[Served]:
    started = Served(folder)
    try:
        yield started
    finally:
        started.replica._polling.cancel()
