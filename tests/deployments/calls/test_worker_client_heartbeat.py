"""A stream without heartbeats fails; other pauses do not count as silence."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorUnavailableError

from deployments.calls.worker_client import HeartbeatStream, StreamEnd, WorkerClient, serve_worker
from deployments.scaling.residency import HEARD, ResidencyReport
from gpu_worker.errors import DeadlineExceeded
from gpu_worker.front.request.request import Delta, Job
from tests.deployments.fake_worker import DELTAS, FakeWorker
from tests.fakes import FakeHandle, FakeResponse
from tests.virtual_time import in_virtual_time

TIMEOUT_S = 30.0


async def script(*items: Any) -> AsyncIterator[Any]:
    """Yield the items. Exceptions are raised, and a float waits for this many timeouts."""
    for item in items:
        if isinstance(item, BaseException):
            raise item
        if isinstance(item, float):
            await asyncio.sleep(item * TIMEOUT_S)
        else:
            yield item


async def read(*items: Any, deadline: float = 1e6) -> list[str | None]:
    """Return what a stream of these items gives until its end."""
    stream: HeartbeatStream[str] = HeartbeatStream(
        FakeResponse(script(*items)), TIMEOUT_S, asyncio.get_running_loop().time
    )
    got = list[str | None]()
    while not isinstance(item := await stream.next(deadline), StreamEnd):
        got.append(item)
    return got


@pytest.mark.parametrize(
    ("items", "got"),
    [
        ((None, "a", None, None, "b", None), [None, "a", None, None, "b", None]),
        ((0.9, None) * 4 + (0.9, "late"), [None] * 4 + ["late"]),
        ((100.0, "first"), ["first"]),
    ],
    ids=["heartbeats are none", "heartbeats keep a stream alive", "the first item may wait for a replica"],
)
@in_virtual_time
async def test_a_stream_with_heartbeats_gives_every_item(items: tuple[Any, ...], got: list[str | None]) -> None:
    assert await read(*items) == got


@in_virtual_time
async def test_a_workers_report_is_a_heartbeat_that_the_router_reads() -> None:
    reports = ResidencyReport("w-of-this-test", 1, b"abcdef"), ResidencyReport("w-of-this-test", 2, b"ghijklmnopqr")
    assert await read(reports[0], "a", reports[1]) == [None, "a", None]
    assert HEARD.held_by("w-of-this-test") == {b"ghijkl", b"mnopqr"}


@pytest.mark.parametrize("report", [None, (), (2, {"digests": b""}), ("w-of-a-later-version", 1, b"abcdef", "more")])
@in_virtual_time
async def test_an_answer_arrives_whatever_the_reports_of_another_version_are(report: tuple[object, ...] | None) -> None:
    assert await read(report, "a", report, "b") == [None, "a", None, "b"]
    if report is not None and len(report) == 4:
        assert HEARD.held_by("w-of-a-later-version") == {b"abcdef"}


@dataclass
class Vanishing(FakeWorker):
    """Takes none of the first two calls."""

    num_calls: int = 0

    async def stream(self, job: Job) -> AsyncIterator[Delta]:
        self.num_calls += 1
        if self.num_calls < 3:
            await asyncio.Event().wait()
        yield DELTAS[0]


def vanishing(num_running: int) -> tuple[FakeHandle, WorkerClient]:
    handle, worker = FakeHandle(Vanishing()), SimpleNamespace(replica_states={"RUNNING": num_running})
    overview: Any = SimpleNamespace(applications={"app": SimpleNamespace(deployments={"Worker": worker})})
    return handle, serve_worker(handle, heartbeat_timeout_s=0.01, status=lambda: overview)


async def test_a_call_that_no_worker_took_is_sent_again_if_one_runs() -> None:
    handle, worker = vanishing(num_running=1)
    assert await worker.stream(Job("r-1", "hello", time_left_s=600.0)).next(time.monotonic() + 60) == DELTAS[0]
    assert [response.num_cancels for response in handle.responses] == [1, 1, 0]
    first, _, last = [job.time_left_s for (job,) in handle.called("stream")]
    assert 540 < last < first == 600


async def test_a_call_waits_for_a_worker_that_starts() -> None:
    handle, worker = vanishing(num_running=0)
    with pytest.raises(DeadlineExceeded):
        await worker.stream(Job("r-1", "hello")).next(time.monotonic() + 0.1)
    assert len(handle.responses) == 1


@pytest.mark.parametrize("said", [(None,), ("a",), (None, "a", None)])
@in_virtual_time
async def test_silence_after_the_first_item_counts_as_a_death(said: tuple[str | None, ...]) -> None:
    with pytest.raises(ActorUnavailableError, match="no heartbeat for 30 s"):
        await read(*said, 1.1, "too late")


@pytest.mark.parametrize(
    "error",
    [
        AioRpcError(grpc.StatusCode.CANCELLED, Metadata(), Metadata(), "the server stops"),
        AioRpcError(grpc.StatusCode.INTERNAL, Metadata(), Metadata(), "a stream was reset"),
        asyncio.CancelledError(),  # error of the replica's task, returned as its answer
    ],
)
@in_virtual_time
async def test_a_broken_call_counts_as_a_death(error: BaseException) -> None:
    for said in ((), ("a",)):
        with pytest.raises(ActorUnavailableError):
            await read(*said, error)


@in_virtual_time
async def test_another_timeout_does_not_count_as_silence() -> None:
    with pytest.raises(TimeoutError, match="its own"):
        await read(None, TimeoutError("its own"))


@in_virtual_time
async def test_the_deadline_ends_a_stream_that_is_alive() -> None:
    with pytest.raises(DeadlineExceeded):
        await read(*(0.9, None) * 200, deadline=100 * TIMEOUT_S)


@in_virtual_time
async def test_a_cancelled_caller_does_not_count_as_a_death() -> None:
    task = asyncio.create_task(read("a", 1000.0))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
