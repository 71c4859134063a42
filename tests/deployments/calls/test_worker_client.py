"""Calls of the Worker: tokens over gRPC, and which calls are repeated."""

from __future__ import annotations

import asyncio
import time

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from deployments.calls.worker_client import StreamEnd, serve_worker
from gpu_worker.front.request.request import Job
from tests.deployments.calls.dying import Dying
from tests.deployments.fake_worker import DELTAS, FakeWorker
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


def test_reads_are_repeated_and_the_call_that_starts_a_worker_is_not() -> None:
    probed, shaped, started = (Dying(num_deaths=1) for _ in range(3))
    asyncio.run(serve_worker(FakeHandle(probed)).probe_many(["d"]))
    asyncio.run(serve_worker(FakeHandle(shaped)).module_shapes())
    with pytest.raises(RayActorError):
        asyncio.run(serve_worker(FakeHandle(started)).wait_for_replica())
    assert probed.received == [("probe_many", ["d"])] * 2
    assert (len(shaped.received), len(started.received)) == (2, 1)


def test_a_broadcast_has_each_replicas_answer_or_error() -> None:
    handle = FakeHandle(FakeWorker(forgets=[False]), FakeWorker(forgets=[RayActorError()]), FakeWorker())
    first, second, third = asyncio.run(serve_worker(handle).broadcast_forget(["d"], 3.0))
    assert (first, type(second), third) == (False, RayActorError, True)
    assert handle.timeouts_s == [3.0]
    with pytest.raises(DeploymentUnavailableError):
        asyncio.run(serve_worker(FakeHandle()).broadcast_usage(3.0))
