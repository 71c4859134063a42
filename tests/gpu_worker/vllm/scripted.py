"""Workers with scripted residency and tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from gpu_worker.bank.device_layout import to_device_layout
from gpu_worker.errors import AdapterLoadFailed
from gpu_worker.front.preprocess import RequestPreprocessor
from gpu_worker.front.request.request import Delta, Job
from gpu_worker.front.row import Row
from gpu_worker.model.base_model import BaseModel
from gpu_worker.vllm.fusions import FusionLoader, with_fusion
from gpu_worker.vllm.packing import Change
from gpu_worker.vllm.remote_bank import RemoteBank
from gpu_worker.vllm.row_runner import NewToken, RowRunner
from lora_store.adapter import AdapterWeights
from tests.gpu_worker.engine_driver import PATIENCE_S
from tests.tiny import InlineExecutor, linear_shapes, tiny_config

LETTER = 64  # a byte token with text


@dataclass
class Workers:
    """The far side of a RowRunner. It checks that a row's adapters are held as long as the row runs."""

    held: set[str] = field(default_factory=set)
    commands: list[str] = field(default_factory=list)
    running: list[Row] = field(default_factory=list)
    most_running: int = 0
    error: Exception | None = None  # for every later generate call
    unfit: dict[str, str] = field(default_factory=dict)  # digest -> why the workers refuse it
    may_go_on: asyncio.Event = field(default_factory=asyncio.Event)
    ending: list[Row] = field(default_factory=list)
    may_end: asyncio.Event | None = None  # what the abort of a row waits for

    async def change(self, changes: list[Change]) -> dict[str, str]:
        await asyncio.sleep(0)
        refused = {}
        for change in changes:
            kind, digest = change[0], change[1]
            self.commands.append(f"{kind} {digest[:2]}")
            if kind == "put" and digest in self.unfit:
                refused[digest] = self.unfit[digest]
            elif kind == "put":
                self.held.add(digest)
            else:
                assert not any(digest in row.weights_digests for row in self.running), "a running row lost an adapter"
                self.held.discard(digest)
        return refused

    async def generate(self, row: Row) -> AsyncGenerator[Sequence[NewToken]]:
        if self.error is not None:
            raise self.error
        self.running.append(row)
        self.most_running = max(self.most_running, len(self.running))
        try:
            for _ in range(row.max_new_tokens + 2):  # a real engine may compute tokens beyond the end
                await self.may_go_on.wait()
                await asyncio.sleep(0)
                assert self.held.issuperset(row.weights_digests), "a row runs without its adapters"
                row.num_cached_tokens = 1
                yield [(LETTER, None)]
        finally:
            self.ending.append(row)
            await (asyncio.sleep(0) if self.may_end is None else self.may_end.wait())  # the abort takes a moment
            self.running.remove(row)


@dataclass
class Asked:
    """A submitted row and its events."""

    row: Row
    events: list[Delta | Exception]

    @property
    def last(self) -> Delta | Exception | None:
        return self.events[-1] if self.events else None


class Bench:
    """A RowRunner over scripted workers. Build it within an event loop."""

    def __init__(
        self,
        base: BaseModel,
        folder: Any,
        pool: dict[str, AdapterWeights],
        clock: Callable[[], float] | None = None,
        executor: Executor | None = None,
        **changes: Any,
    ) -> None:
        sizes = {"bank_rank_rows": 8, "fusion_rank_rows": 8, "max_batch_size": 2}
        config = tiny_config(folder, engine="vllm", **sizes | changes)
        self.workers, self.pool = Workers(), pool
        self.loop = asyncio.get_running_loop()
        self.bank = RemoteBank(self.workers.change, lambda error: self.runner.stop(error))
        self.loader = FusionLoader(
            self._fetch,
            to_device_layout=partial(to_device_layout, shapes=linear_shapes(base), dtype=base.dtype),
            executor=executor or InlineExecutor(),
            budget_bytes=1 << 20,
            on_done=lambda: self.runner.pump(),
        )
        self.prepare = RequestPreprocessor(base, 160, self.loop.time)
        time = clock or self.loop.time
        self.runner = RowRunner(config, self.workers.generate, self.bank, self.loader, kv_tokens=320, clock=time)

    def ask(self, *jobs: Job) -> list[Asked]:
        """Submit all jobs together."""
        asked = []
        for job in jobs:
            events: list[Delta | Exception] = []
            asked.append(Asked(self.prepare(replace(job, plan=with_fusion(job.plan)), events.append), events))
        self.runner.submit([one.row for one in asked])
        return asked

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not holds():
                await asyncio.sleep(0.001)

    async def idle(self) -> None:
        """Wait until no row runs or waits, and the workers have applied all changes."""
        await self.until(lambda: self.runner.status().num_running + self.runner.status().num_waiting == 0)
        await self.bank.drained()

    def _fetch(self, digest: str) -> Future[AdapterWeights]:
        fetched: Future[AdapterWeights] = Future()
        if digest in self.pool:
            fetched.set_result(self.pool[digest])
        else:
            fetched.set_exception(AdapterLoadFailed("no such adapter"))
        return fetched
