"""Calls of the Worker: tokens over gRPC, and which calls are repeated."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from deployments.calls.catalogue_clients import Shapes
from deployments.calls.worker_client import StreamEnd, serve_worker
from gpu_worker.front.request.request import Job
from tests.deployments.fake_worker import DELTAS, SHAPES, FakeWorker
from tests.fakes import FakeHandle

JOB = Job("r-1", "hello")


async def test_a_stream_goes_over_grpc_and_can_be_cancelled() -> None:
    handle = FakeHandle(FakeWorker())
    deadline = time.monotonic() + 60
    deltas = serve_worker(handle).stream(JOB)
    assert [await deltas.next(deadline) for _ in range(4)] == [*DELTAS, StreamEnd.END]
    assert handle.responses[0].num_cancels == 0
    deltas.cancel()
    assert handle.responses[0].num_cancels == 1
    assert [(call.name, call.args, call.by_reference) for call in handle.calls] == [("stream", (JOB,), False)]


@dataclass
class Mortal(FakeWorker):
    """Dies in the first call."""

    asked: list[str] = field(default_factory=list)

    async def module_shapes(self) -> Shapes:
        self._die_once("module_shapes")
        return SHAPES

    async def probe_many(self, weights_digests: Sequence[str]) -> list[float | Exception]:
        self._die_once("probe_many")
        return [0.5]

    def _die_once(self, method: str) -> None:
        self.asked.append(method)
        if len(self.asked) == 1:
            raise RayActorError()


def test_reads_are_repeated_and_the_call_that_starts_a_worker_is_not() -> None:
    probed, shaped, started = Mortal(), Mortal(), Mortal()
    assert asyncio.run(serve_worker(FakeHandle(probed)).probe_many(["d"])) == [0.5]
    assert asyncio.run(serve_worker(FakeHandle(shaped)).module_shapes()) == SHAPES
    with pytest.raises(RayActorError):
        asyncio.run(serve_worker(FakeHandle(started)).wait_for_replica())
    assert (len(probed.asked), len(shaped.asked), len(started.asked)) == (2, 2, 1)


def test_a_broadcast_has_each_replicas_answer_or_error() -> None:
    handle = FakeHandle(FakeWorker(forgets=[False]), FakeWorker(forgets=[RayActorError()]), FakeWorker())
    first, second, third = asyncio.run(serve_worker(handle).broadcast_forget(["d"], 3.0))
    assert (first, type(second), third) == (False, RayActorError, True)
    assert handle.timeouts_s == [3.0]
    with pytest.raises(DeploymentUnavailableError):
        asyncio.run(serve_worker(FakeHandle()).broadcast_usage(3.0))
