"""A worker that answers when a test permits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from gpu_worker.front.request.request import Delta, Job
from tests.deployments.adapter_records import BASE
from tests.deployments.fake_worker import DELTAS, FakeWorker

CHAT = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}]}


class Held(FakeWorker):
    """Answers every request once `let_go` is set, and counts those that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = asyncio.Event()
        self.num_asked = 0
        self.asked = asyncio.Condition()

    async def stream(self, job: Job) -> AsyncIterator[Delta]:
        async with self.asked:
            self.num_asked += 1
            self.asked.notify_all()
        await self.let_go.wait()
        for delta in DELTAS:
            yield delta

    async def has(self, count: int) -> None:
        async with self.asked:
            await self.asked.wait_for(lambda: self.num_asked == count)
