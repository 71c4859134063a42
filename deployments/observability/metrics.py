"""Shared by the metrics of all replicas: the metric factory, buckets, and the interval of reports."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from ray.serve import metrics

logger = logging.getLogger(__name__)

MetricFactory = Any
"""Has Counter, Gauge and Histogram: Serve's, which add labels for application, deployment and replica, or a fake's."""
SERVE: MetricFactory = metrics

REPORT_INTERVAL_S = 5.0  # Ray drops a gauge that was not set for 20 s by default
OTHER = "(other)"  # label of all adapters beyond a bound; no adapter can have this name
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
SHORT_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

Sleep = Callable[[float], Awaitable[None]]


async def report_periodically(report: Callable[[], Awaitable[None]], sleep: Sleep = asyncio.sleep) -> None:
    """Call `report` every `REPORT_INTERVAL_S` forever. Log the first error of each series of failures."""
    is_failing = False
    while True:
        try:
            await report()
            is_failing = False
        except Exception as exc:
            if not is_failing:
                logger.warning("cannot report metrics: %s", exc or type(exc).__name__)
            is_failing = True
        await sleep(REPORT_INTERVAL_S)
