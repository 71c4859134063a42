"""Work in the background continues when its caller leaves, and its failures are logged."""

from __future__ import annotations

import asyncio

import pytest

from deployments.background import Background


async def test_a_failure_is_logged_with_its_name(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ValueError("broken")

    background = Background()
    background.start(fail(), "tidying")
    await background.idle()
    [record] = caplog.records
    assert (record.levelname, record.getMessage()) == ("ERROR", "tidying failed")
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "broken"


async def test_work_continues_when_its_caller_leaves() -> None:
    background, go, done = Background(), asyncio.Event(), []

    async def work() -> None:
        await go.wait()
        done.append(True)

    caller = asyncio.create_task(background.run(work()))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait([caller])
    go.set()
    await background.idle()
    assert (caller.cancelled(), done) == (True, [True])


async def test_run_returns_the_result_or_raises_the_error() -> None:
    async def half(number: int) -> int:
        if number % 2:
            raise ValueError(number)
        return number // 2

    background = Background()
    assert await background.run(half(6)) == 3
    with pytest.raises(ValueError, match="7"):
        await background.run(half(7))


async def test_cancel_ends_running_work_without_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    background, ended = Background(), []

    async def wait_for_ever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    background.start(wait_for_ever(), "waiting")
    await asyncio.sleep(0)
    background.cancel()
    await background.idle()
    assert ended == [True]
    assert caplog.records == []


def test_cancel_after_the_loop_has_closed_does_nothing() -> None:
    background = Background()

    async def run() -> None:
        background.start(asyncio.Event().wait(), "waiting")  # type: ignore[arg-type]

    asyncio.run(run())
    background.cancel()
