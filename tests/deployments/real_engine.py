"""An Ingress in this process whose Worker is a real engine over a tiny model, and the state of all of it."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import torch

from gpu_worker.front.request.request import Delta, Job
from gpu_worker.front.row import Row
from gpu_worker.native.engine import NativeEngine
from gpu_worker.native.loop import Engine
from tests.deployments.adapter_records import POOL, pool_of
from tests.deployments.app_fakes import Served, http_of, serve_plainly
from tests.deployments.fake_store import FakeStore
from tests.deployments.fake_worker import FakeWorker
from tests.gpu_worker.engine_driver import fetching, stream_text
from tests.tiny import InlineExecutor, linear_shapes, random_adapter, tiny_config

_THREADS = 4
_NUM_COUNTS = 3
GOOD: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", {"model": "auto", "messages": [{"role": "user", "content": "Tell me of the sea"}]}),
    ("/v1/completions", {"model": "poet", "prompt": "The sea"}),
)


class EngineWorker(FakeWorker):
    """Streams from an engine; everything else is the fake's."""

    def __init__(self, loop: NativeEngine) -> None:
        super().__init__()
        self._loop = loop

    async def stream(self, job: Job) -> AsyncIterator[Delta]:
        async with aclosing(stream_text(self._loop, job)) as deltas:
            async for delta in deltas:
                yield delta


@dataclass
class HttpFront:
    """The routes, the services behind them, and the event loop that all requests share."""

    runner: asyncio.Runner
    served: Served
    client: httpx.AsyncClient
    engine: NativeEngine
    quiet: list[str] = field(default_factory=list)  # answers of the good requests without any others
    earlier: frozenset[threading.Thread] = field(default_factory=lambda: frozenset(threading.enumerate()))

    async def ask_good(self) -> list[str]:
        """Return the texts of the good requests, sent at once."""
        sampling = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
        answers = await asyncio.gather(*[self.client.post(path, json=body | sampling) for path, body in GOOD])
        assert [answer.status_code for answer in answers] == [200] * len(GOOD)
        choices = [answer.json()["choices"][0] for answer in answers]
        return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]

    def held(self) -> dict[str, Any]:
        """Return all state that would grow if a request left anything behind."""
        return self.runner.run(self._held())

    def _new_threads(self) -> set[threading.Thread]:
        """Return the threads since the start. Those that prepare prompts, a fixed number, start with the prompts."""
        return set(threading.enumerate()) - self.earlier

    async def _held(self) -> dict[str, Any]:
        await self.served.services.background.idle()
        while (holdings := await self.engine.status()).num_running + holdings.num_waiting:
            await asyncio.sleep(0.001)
        rows = [await self._count_rows() for _ in range(_NUM_COUNTS)]
        engine = self.engine.loop
        return {
            "engine": holdings,
            "pins": engine.residency.num_pins,
            "rows": min(rows),
            "tasks": len(asyncio.all_tasks()),
            "threads": len([thread for thread in self._new_threads() if not thread.name.startswith("prepare")]),
            "in flight": self.served.services.in_flight.count,
            "bodies": self.served.services.bodies.num_bytes,
            "uploads": self.served.services.uploads.num_bytes,
        }

    async def _count_rows(self) -> int:
        """Return the number of rows in memory, after the engine's thread has had a turn: it may hold the last one."""
        await self.engine.status()
        await asyncio.sleep(0.01)
        gc.collect()
        return sum(type(thing) is Row for thing in gc.get_objects())


@contextmanager
def open_front(tiny_base: Any, folder: Path, **settings: Any) -> Iterator[HttpFront]:
    """Yield an HTTP front that has answered the good requests once."""
    base = tiny_base("gemma3")
    with torch.no_grad():
        base.model.get_input_embeddings().weight[256:] = 0  # tied to the head, so that no token without text is chosen
    shapes = linear_shapes(base)
    weights = [random_adapter(shapes, seed) for seed in range(len(POOL))]
    held = {
        record.weights_digest: replace(w, weights_digest=record.weights_digest)
        for record, w in zip(POOL, weights, strict=True)
    }
    config = tiny_config(folder, max_model_len=320)
    engine = Engine(config, fetching(held.__getitem__, InlineExecutor()), base=base, executor=InlineExecutor())
    loop = NativeEngine(engine, stream_interval_ms=0)
    with asyncio.Runner() as runner:
        runner.get_loop().set_default_executor(_full_executor())
        served = runner.run(_serve(loop, settings))
        http = http_of(served)
        client = runner.run(http.__aenter__())
        try:
            front = HttpFront(runner, served, client, loop)
            front.quiet = runner.run(front.ask_good())
            yield front
        finally:
            runner.run(http.__aexit__(None, None, None))
            loop.stop()


async def _serve(loop: NativeEngine, settings: dict[str, Any]) -> Served:
    served = serve_plainly(worker=EngineWorker(loop), store=FakeStore(pool_of(*POOL)), **settings)
    await served.services.preload.wait()
    return served


def _full_executor() -> ThreadPoolExecutor:
    """Return an executor whose threads have all started, so that their number does not depend on requests."""
    executor = ThreadPoolExecutor(_THREADS)
    together = threading.Barrier(_THREADS)
    list(executor.map(lambda _: together.wait(), range(_THREADS)))
    return executor
