from __future__ import annotations

import asyncio
import logging

import pytest

from deployments.observability.metrics import REPORT_INTERVAL_S, report_periodically


def test_a_failed_report_is_repeated_at_the_next_interval(caplog: pytest.LogCaptureFixture) -> None:
    """A series of failures is logged once, however long it lasts."""
    outcomes: list[Exception | None] = [None, OSError("away"), OSError("away"), None, OSError("again")]
    slept: list[float] = []

    async def show() -> None:
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if not outcomes:
            raise asyncio.CancelledError

    with caplog.at_level(logging.WARNING), pytest.raises(asyncio.CancelledError):
        asyncio.run(report_periodically(show, sleep))
    assert slept == [REPORT_INTERVAL_S] * 5
    assert [record.getMessage() for record in caplog.records] == [
        "cannot report metrics: away",
        "cannot report metrics: again",
    ]
