"""What every replica's figures share: the kinds of metrics, buckets, and the beat at which gauges are told again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from ray.serve import metrics

logger = logging.getLogger(__name__)

MetricFactory = Any
"""Has Counter, Gauge and Histogram: those of Serve, which add application, deployment and replica, or a test's."""
SERVE: MetricFactory = metrics

REPORT_INTERVAL_S = 5.0  # Ray forgets a gauge that was not set for two of its own intervals, 20 s by default
OTHER = "(other)"  # what a bounded set of labels leaves out; no adapter can have this name
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
SHORT_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

Sleep = Callable[[float], Awaitable[None]]


async def report_periodically(show: Callable[[], Awaitable[None]], sleep: Sleep = asyncio.sleep) -> None:
    """Call `show` for ever. That it fails is logged once, until it works again: figures stop no replica."""
    is_failing = False
    while True:
        try:
            await show()
            is_failing = False
        except Exception as exc:
            if not is_failing:
                logger.warning("figures are not told: %s", exc or type(exc).__name__)
            is_failing = True
        await sleep(REPORT_INTERVAL_S)
