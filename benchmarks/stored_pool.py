"""Random adapters in a store on disk, and a worker's path from there into an engine."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

from benchmarks.engine_cases import RANK, Shapes, console, plan_of, random_modules
from deployments.weights import StoredWeights, WeightsFetcher
from gpu_worker.bank.load_threads import load_executor
from gpu_worker.config import NativeWorkerConfig
from gpu_worker.native.loop import Engine
from gpu_worker.native.openmp import run_on_short_lived_thread
from lora_store import AdapterRef, AdapterWeights, LoraStore, Plan, Strategy, write_peft_folder

_BATCH = 64  # adapters per commit


class StoredPool:
    """An engine whose adapters are in a LoraStore in a temporary folder. A context manager.

    Weights take a worker's path: the store reads them; loading threads hash, decode and convert them. Only
    Ray's object store is missing. The files were just written, so they are in the page cache.
    """

    def __init__(self, **settings: Any) -> None:
        self.config = NativeWorkerConfig(
            **{"prefix_cache": False, "shares_cores": False} | settings
        )  # the cases repeat their prompts
        self._folder = tempfile.TemporaryDirectory()
        self._store = LoraStore(str(Path(self._folder.name, "store")), accepts_base=[self.config.base_model])
        executor = load_executor(self.config.load_threads)
        self._fetcher = WeightsFetcher(StoredWeights(self._store), executor)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fetches", daemon=True)
        self.engine = run_on_short_lived_thread(lambda: Engine(self.config, self._fetch, executor=executor))
        self.adapters: list[tuple[AdapterRef, str]] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._folder.cleanup()

    def publish(self, count: int) -> None:
        """Publish `count` random adapters of rank 8 for all modules. Fill `adapters` with (ref, weights digest)."""
        shapes = self.engine.bank.shapes
        for start in range(0, count, _BATCH):
            staged = [self._staged(number, shapes) for number in range(start, min(start + _BATCH, count))]
            nothing = [None] * len(staged)
            self._store.commit(staged, nothing, nothing, actor="benchmark")
            self.adapters += [(item.record.ref, item.record.weights_digest) for item in staged]
            console.print(f"{len(self.adapters)} of {count} adapters of rank {RANK} are published")

    def plan(self, strategy: Strategy, *numbers: int) -> Plan:
        """Return a plan of the adapters with these numbers, equally weighted."""
        return plan_of(strategy, [self.adapters[number] for number in numbers])

    def _staged(self, number: int, shapes: Shapes) -> Any:
        with tempfile.TemporaryDirectory(dir=self._folder.name) as name:
            folder = Path(name)
            write_peft_folder(folder, random_modules(number, shapes), base_model=self.config.base_model)
            return self._store.stage(folder, name=f"adapter-{number}", module_shapes=shapes)

    def _fetch(self, digest: str) -> Future[AdapterWeights]:
        """Called on the engine's thread."""
        return asyncio.run_coroutine_threadsafe(self._fetcher.fetch(digest), self._loop)
