"""A stream without heartbeats fails; other pauses do not count as silence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorUnavailableError

from deployments.calls.worker_client import HeartbeatStream, StreamEnd
from deployments.scaling.residency import HEARD, ResidencyReport
from gpu_worker.errors import DeadlineExceeded
from tests.fakes import FakeResponse
from tests.virtual_time import in_virtual_time, run_in_virtual_time

TIMEOUT_S = 30.0


def stream_of(items: AsyncIterator[str | ResidencyReport | None]) -> HeartbeatStream[str]:
    return HeartbeatStream(FakeResponse(items), TIMEOUT_S, asyncio.get_running_loop().time)


async def all_of(items: AsyncIterator[str | ResidencyReport | None], deadline: float = 1e6) -> list[str | None]:
    stream, got = stream_of(items), list[str | None]()
    while not isinstance(item := await stream.next(deadline), StreamEnd):
        got.append(item)
    return got


def test_heartbeats_are_none() -> None:
    async def items() -> AsyncIterator[str | None]:
        for item in (None, "a", None, None, "b", None):
            yield item

    assert run_in_virtual_time(all_of(items())) == [None, "a", None, None, "b", None]


def test_a_workers_report_is_a_heartbeat_that_the_router_reads() -> None:
    async def items() -> AsyncIterator[str | ResidencyReport]:
        yield ResidencyReport("w-of-this-test", 1, b"abcdef")
        yield "a"
        yield ResidencyReport("w-of-this-test", 2, b"ghijklmnopqr")

    assert run_in_virtual_time(all_of(items())) == [None, "a", None]
    assert HEARD.held_by("w-of-this-test") == {b"ghijkl", b"mnopqr"}


@pytest.mark.parametrize("report", [None, (), (2, {"digests": b""}), ("w-of-a-later-version", 1, b"abcdef", "more")])
def test_an_answer_arrives_whatever_the_reports_of_another_version_are(report: tuple[object, ...] | None) -> None:
    async def items() -> AsyncIterator[Any]:
        for item in (report, "a", report, "b"):
            yield item

    assert run_in_virtual_time(all_of(items())) == [None, "a", None, "b"]
    if report is not None and len(report) == 4:
        assert HEARD.held_by("w-of-a-later-version") == {b"abcdef"}


def test_heartbeats_keep_a_stream_alive() -> None:
    async def items() -> AsyncIterator[str | None]:
        for _ in range(4):
            await asyncio.sleep(0.9 * TIMEOUT_S)
            yield None
        yield "late"

    assert run_in_virtual_time(all_of(items())) == [None] * 4 + ["late"]


def test_the_first_item_has_no_time_limit() -> None:
    async def items() -> AsyncIterator[str | None]:
        await asyncio.sleep(100 * TIMEOUT_S)
        yield "first"

    assert run_in_virtual_time(all_of(items())) == ["first"]


@pytest.mark.parametrize("said", [(None,), ("a",), (None, "a", None)])
def test_silence_after_the_first_item_counts_as_a_death(said: tuple[str | None, ...]) -> None:
    async def items() -> AsyncIterator[str | None]:
        for item in said:
            yield item
        await asyncio.sleep(1.1 * TIMEOUT_S)
        yield "too late"

    with pytest.raises(ActorUnavailableError, match="no heartbeat for 30 s"):
        run_in_virtual_time(all_of(items()))


BROKEN_OFF = [
    AioRpcError(grpc.StatusCode.CANCELLED, Metadata(), Metadata(), "the server stops"),
    AioRpcError(grpc.StatusCode.INTERNAL, Metadata(), Metadata(), "a stream was reset"),
    asyncio.CancelledError(),  # error of the replica's task, returned as its answer
]


@pytest.mark.parametrize("error", BROKEN_OFF)
def test_a_broken_call_counts_as_a_death(error: BaseException) -> None:
    async def items() -> AsyncIterator[str | None]:
        yield "a"
        raise error

    with pytest.raises(ActorUnavailableError):
        run_in_virtual_time(all_of(items()))


@in_virtual_time
async def test_a_cancelled_caller_does_not_count_as_a_death() -> None:
    async def items() -> AsyncIterator[str | None]:
        yield "a"
        await asyncio.Event().wait()

    task = asyncio.create_task(all_of(items()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_another_timeout_does_not_count_as_silence() -> None:
    async def items() -> AsyncIterator[str | None]:
        yield None
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        run_in_virtual_time(all_of(items()))


def test_the_deadline_ends_a_stream_that_is_alive() -> None:
    async def items() -> AsyncIterator[str | None]:
        while True:
            await asyncio.sleep(0.9 * TIMEOUT_S)
            yield None

    with pytest.raises(DeadlineExceeded):
        run_in_virtual_time(all_of(items(), deadline=100 * TIMEOUT_S))


@in_virtual_time
async def test_cancelling_a_stream_cancels_the_call() -> None:
    async def items() -> AsyncIterator[str | None]:
        yield "a"
        yield "b"

    response = FakeResponse(items())
    stream: HeartbeatStream[str] = HeartbeatStream(response, TIMEOUT_S)
    stream.cancel()
    assert response.num_cancels == 1
