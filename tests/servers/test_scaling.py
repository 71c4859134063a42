"""Workers are added and removed with the load; no request fails, and no stream is cut."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from tests.cluster.scaling_app import (
    NUM_STREAMS,
    completion,
    num_workers,
    on_machines,
    rise_and_fall,
    settings_of,
    worker_replicas,
)
from tests.e2e.live import eventually, eventually_equal, is_ready
from tests.servers.started import MOST_WORKERS
from tests.soak import Scale

MOST_ON_NODES = 3


@pytest.fixture(scope="module")
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address: on one machine; at full counts on several nodes, with workers on those with `accelerator`."""
    if request.config.getoption("--scale") == "full":
        folder = tmp_path_factory.mktemp("scaling")
        with on_machines(folder, settings_of(folder, min_workers=0, max_workers=MOST_ON_NODES)) as address:
            yield address
    else:
        yield request.getfixturevalue("started").url


def test_workers_scale_to_zero_and_the_first_request_starts_one(url: str, scale: Scale) -> None:
    if not scale.is_full:
        pytest.skip(
            "tests/e2e/test_several_bases.py has a base model that falls asleep and wakes: on nodes in make soak"
        )
    eventually_equal(lambda: num_workers(url), 0)
    for _ in range(3):
        assert is_ready(url)
    eventually_equal(lambda: worker_replicas(url), {"answered": 0, "silent": 0})  # neither has started one
    answers = [httpx.post(f"{url}/v1/completions", json=completion(4), timeout=120) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json()["choices"] == answers[1].json()["choices"]
    assert num_workers(url) == 1


def test_workers_follow_the_load_and_removed_ones_end_their_streams(url: str, scale: Scale) -> None:
    most = scale.pick("workers under load", small=MOST_WORKERS, full=MOST_ON_NODES)
    high_s = scale.pick("seconds of high load", small=1, full=60)
    eventually(lambda: num_workers(url) <= 1)
    course = asyncio.run(rise_and_fall(url, most=most, high_s=high_s))
    scale.record("requests", len(course.statuses))
    scale.record(f"seconds from load to {most} workers", course.up_s)
    scale.record("seconds from its end to 1 worker", course.down_s)
    assert set(course.statuses) == {200}
    assert course.num_left_behind > 1
    assert course.ends == [(course.num_tokens, "length")] * NUM_STREAMS
