"""A stream that falls silent, and what is not silence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorUnavailableError

from deployments.calls.heartbeat import drop_heartbeats

SILENCE_S = 0.1


async def all_of(items: AsyncIterator[str | None], silence_s: float = SILENCE_S) -> list[str]:
    return [item async for item in drop_heartbeats(items, silence_s)]


def test_signs_of_life_are_not_handed_on() -> None:
    async def items() -> AsyncIterator[str | None]:
        for item in (None, "a", None, None, "b", None):
            yield item

    assert asyncio.run(all_of(items())) == ["a", "b"]


def test_signs_of_life_are_enough() -> None:
    async def items() -> AsyncIterator[str | None]:
        for _ in range(4):
            await asyncio.sleep(0.3)
            yield None
        yield "late"

    assert asyncio.run(all_of(items(), 1.0)) == ["late"]


def test_the_first_may_take_as_long_as_it_takes() -> None:
    async def items() -> AsyncIterator[str | None]:
        await asyncio.sleep(2 * SILENCE_S)
        yield "first"

    assert asyncio.run(all_of(items())) == ["first"]


@pytest.mark.parametrize("said", [(None,), ("a",), (None, "a", None)])
def test_silence_after_the_first_is_a_death(said: tuple[str | None, ...]) -> None:
    async def items() -> AsyncIterator[str | None]:
        for item in said:
            yield item
        await asyncio.Event().wait()

    with pytest.raises(ActorUnavailableError, match="no sign of life for"):
        asyncio.run(asyncio.wait_for(all_of(items()), 5))


BROKEN_OFF = [
    AioRpcError(grpc.StatusCode.CANCELLED, Metadata(), Metadata(), "the server stops"),
    AioRpcError(grpc.StatusCode.INTERNAL, Metadata(), Metadata(), "a stream was reset"),
    asyncio.CancelledError(),  # of the replica's task, handed on as its answer
]


@pytest.mark.parametrize("error", BROKEN_OFF)
def test_a_call_that_was_broken_off_is_a_death(error: BaseException) -> None:
    async def items() -> AsyncIterator[str | None]:
        yield "a"
        raise error

    with pytest.raises(ActorUnavailableError):
        asyncio.run(all_of(items()))


def test_a_caller_that_is_cancelled_is_no_death() -> None:
    async def items() -> AsyncIterator[str | None]:
        yield "a"
        await asyncio.Event().wait()

    async def main() -> None:
        task = asyncio.create_task(all_of(items(), 20.0))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_another_timeout_is_no_silence() -> None:
    async def items() -> AsyncIterator[str | None]:
        yield None
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        asyncio.run(all_of(items()))
