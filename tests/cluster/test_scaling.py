"""Workers come with the load and go with it; no request fails, and no stream is cut."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.cluster.scaling_app import (
    TARGET_REQUESTS,
    asking,
    completion,
    is_ready,
    num_workers,
    served,
    settings_of,
    streaming,
    until,
    until_workers,
)
from tests.soak import Scale

pytestmark = pytest.mark.e2e
MOST = 3
STREAM_TOKENS = 3000  # longer than it takes for a worker to go


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("scaling")
    with served(folder, settings_of(folder, min_workers=0, max_workers=MOST)) as address:
        yield address


def test_workers_sleep_without_load_and_the_first_request_wakes_one(url: str) -> None:
    until(lambda: num_workers(url) == 0)
    for _ in range(3):
        assert is_ready(url)
    stats = httpx.get(f"{url}/v1/stats").json()["workers"]["replicas"]
    assert stats == {"answered": 0, "silent": 0}  # neither has woken one
    answers = [httpx.post(f"{url}/v1/completions", json=completion(4), timeout=120) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json()["choices"] == answers[1].json()["choices"]
    assert num_workers(url) == 1


@dataclass
class Course:
    """How a load went: seconds until the most workers ran, and after it until one was left."""

    up_s: float
    down_s: float
    statuses: list[int]
    ends: list[tuple[int, str]]
    num_left_behind: int  # streams still running when all workers but one took no more requests


async def rise_and_fall(url: str, *, most: int, high_s: float) -> Course:
    """Load until `most` workers run and for `high_s` longer; then streams alone, which one worker is enough for."""
    stop, statuses = asyncio.Event(), list[int]()
    async with httpx.AsyncClient(base_url=url, timeout=180, limits=httpx.Limits(max_connections=200)) as client:
        num_clients = most * TARGET_REQUESTS - 2
        clients = [asyncio.create_task(asking(client, statuses, stop)) for _ in range(num_clients)]
        up_s = await until_workers(url, most)
        await asyncio.wait(clients, timeout=high_s)
        begun = [asyncio.Event() for _ in range(TARGET_REQUESTS - 1)]
        streamed = [asyncio.create_task(streaming(client, STREAM_TOKENS, event)) for event in begun]
        await asyncio.gather(*[event.wait() for event in begun])
        stop.set()
        await asyncio.gather(*clients)
        started = time.monotonic()
        await until_workers(url, 1)
        down_s = time.monotonic() - started
        num_left_behind = sum(not task.done() for task in streamed)
        return Course(up_s, down_s, statuses, await asyncio.gather(*streamed), num_left_behind)


def test_workers_follow_the_load_and_those_that_go_end_their_streams(url: str, scale: Scale) -> None:
    most = scale.pick("workers under load", small=2, full=MOST)
    high_s = scale.pick("seconds of high load", small=1, full=60)
    until(lambda: num_workers(url) <= 1)
    course = asyncio.run(rise_and_fall(url, most=most, high_s=high_s))
    scale.record("requests", len(course.statuses))
    scale.record(f"seconds from load to {most} workers", course.up_s)
    scale.record("seconds from its end to 1 worker", course.down_s)
    assert set(course.statuses) == {200}
    assert course.num_left_behind > 1
    assert course.ends == [(STREAM_TOKENS, "length")] * (TARGET_REQUESTS - 1)
