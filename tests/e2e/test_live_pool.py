"""A pool that changes while it serves: every promise over HTTP, with two retrievers, two workers and an S3 store."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator

import httpx
import pytest
import ray

from tests.e2e.live import APP, Live, completion, eventually, eventually_equal, kill_replicas, settled, stream_texts
from tests.served_engine import START_S
from tests.soak import Scale

_SEEDS = itertools.count(1)
_UPDATE_TOKENS = 1200  # of streams that should last longer than an update
_BANK_ADAPTERS = 8  # adapters of rank 4 fit the live application's bank


@pytest.fixture
def seed() -> int:
    return next(_SEEDS) * 1000


@pytest.fixture
def resident(live: Live, seed: int) -> Iterator[str]:
    """Return an adapter that is in both workers' banks."""
    live.publish(live.folder("resident", seed, "tall ships"))
    eventually(lambda: _in_every_bank(live, "resident"))
    yield "resident"
    live.call("DELETE", "/v1/loras/resident")


def _in_every_bank(live: Live, name: str) -> bool:
    """Whether it is after so many requests at once that one worker's queue is too long for all of them."""
    asyncio.run(stream_texts(live, [name] * 16, 64))
    digest = live.call("GET", f"/v1/loras/{name}").json()["weights_digest"]
    return all(digest in holdings.resident for holdings in live.on_all("Worker", "load"))


def test_a_published_adapter_is_found_at_once_by_every_replica(live: Live, seed: int) -> None:
    answer = live.publish(live.folder("bees", seed, "bees and their honey"))
    assert answer["replicas"] == {"ready": 2, "behind": 0}
    assert {live.chosen("Tell me about bees and their honey, now.") for _ in range(20)} == {"bees"}
    assert live.text("bees") != live.text("tiny")
    assert live.call("DELETE", "/v1/loras/bees").status_code == 200


def test_an_uploaded_folder_is_the_same_version_as_its_path(live: Live, seed: int) -> None:
    folder = live.folder("chess", seed, "chess openings")
    uploaded = live.upload(folder)
    assert uploaded.status_code == 201, uploaded.text
    assert live.publish(folder)["digest"] == uploaded.json()["digest"]
    assert live.chosen("Explain chess openings to me.") == "chess"
    assert live.call("DELETE", "/v1/loras/chess").status_code == 200


def test_running_rows_keep_the_version_they_began_with(live: Live, scale: Scale) -> None:
    versions = [live.folder("tides", seed, "tides") for seed in (1000, 1001)]  # both have text from the first token on
    alone = []
    for folder in versions:
        live.publish(folder)
        alone.append(live.text("tides", max_tokens=_UPDATE_TOKENS))
    assert all(alone) and alone[0] != alone[1]
    num_streams = scale.pick("streams", small=6, full=16)
    for update in range(scale.pick("updates", small=1, full=40)):
        live.publish(versions[update % 2])
        running, published_at, after = asyncio.run(_update_midway(live, versions[1 - update % 2], num_streams))
        assert {text for text, _ in running} == {alone[update % 2]}
        assert max(ended for _, ended in running) > published_at, "no stream was running when the update came"
        assert after == alone[1 - update % 2]
    live.call("DELETE", "/v1/loras/tides")


async def _update_midway(live: Live, folder: object, num_streams: int) -> tuple[list[tuple[str, float]], float, str]:
    started = asyncio.Event()
    streams = asyncio.create_task(stream_texts(live, ["tides"] * num_streams, _UPDATE_TOKENS, started=started))
    await asyncio.wait({streams, asyncio.create_task(started.wait())}, timeout=60, return_when="FIRST_COMPLETED")
    assert not streams.done(), f"the streams ended before the update: {streams.result()}"
    assert started.is_set()
    async with httpx.AsyncClient(timeout=60) as client:
        answer = await client.post(f"{live.url}/v1/loras", json={"path": str(folder)})
        assert answer.status_code == 201, answer.text
        published_at = time.monotonic()
        body = completion("tides", "The sea is", _UPDATE_TOKENS)
        after = await client.post(f"{live.url}/v1/completions", json=body)
    return await streams, published_at, after.json()["choices"][0]["text"]


def test_withdrawing_and_expiring_free_everything(live: Live, seed: int, scale: Scale) -> None:
    unlisted: list[str] = []

    def cycle(number: int, num_brief: int) -> None:
        brief = [live.folder(f"brief-{number}-{n}", seed + 1000 + 10 * number + n, "brief") for n in range(num_brief)]
        if brief:
            live.publish_all(brief, ttl_s=600)
        assert [live.ask(folder.name, max_tokens=2).status_code for folder in brief] == [200] * num_brief
        if brief:
            live.publish_all(brief, ttl_s=1)
        unlisted.extend(folder.name for folder in brief)
        live.publish(live.folder("comet", seed + number, f"comet number {number}"))
        assert [live.text("comet", max_tokens=2) for _ in range(4)]
        assert live.call("DELETE", "/v1/loras/comet").status_code == 200
        assert {live.ask("comet").status_code for _ in range(6)} == {404}

    def held() -> dict[str, object]:
        workers = [(set(w.resident), w.host_cache_bytes, w.free_kv_rows) for w in live.on_all("Worker", "load")]
        used = ray.cluster_resources()["object_store_memory"] - ray.available_resources()["object_store_memory"]
        return {"workers": workers, "blobs": live.stored("blobs"), "holds": live.stored("holds"), "used": used}

    cycle(0, 0)
    before, log_before = settled(held), sum(live.stored("catalogue/_delta_log").values())
    num_cycles = scale.pick("cycles", small=2, full=100)
    num_brief = scale.pick("unlisted adapters in a cycle", small=1, full=10)
    for number in range(1, num_cycles + 1):
        cycle(number, num_brief)
    eventually(lambda: live.ask(unlisted[-1]).status_code == 404)
    eventually_equal(held, before)
    assert {live.ask(name).status_code for name in unlisted} == {404}
    names = {lora["name"] for lora in live.call("GET", "/v1/loras").json()["data"]}
    assert {stats.num_live for stats in live.on_all("Retriever", "index_stats")} == {len(names)}
    if num_cycles * 5 < 100:  # a compaction writes a checkpoint, which is not an event
        grown = sum(live.stored("catalogue/_delta_log").values()) - log_before
        assert grown <= 2048 * 5 * num_cycles


@pytest.fixture(scope="module")
def stars(live: Live) -> Iterator[list[str]]:
    """Return as many adapters as both workers' banks have room for."""
    folders = [live.folder(f"star-{n}", 500 + n, f"star {n}") for n in range(2 * _BANK_ADAPTERS)]
    live.publish_all(folders)
    yield [folder.name for folder in folders]
    live.withdraw_all(folder.name for folder in folders)


def test_a_dead_endpoint_affects_only_operations_that_need_it(
    live: Live, stars: list[str], resident: str, seed: int, scale: Scale
) -> None:
    eventually(lambda: _in_every_bank(live, resident))
    whole = live.text(resident)
    cold = [name for name in stars if not _is_resident(live, name)]
    assert cold, "every adapter is in a bank: there is nothing to miss"
    live.on_all("Store", "release", [live.call("GET", f"/v1/loras/{name}").json()["weights_digest"] for name in cold])
    live.endpoint.stop()
    try:
        deadline = time.monotonic() + scale.pick("seconds", small=3, full=60)
        while time.monotonic() < deadline:
            assert live.text(resident) == whole
        refused = live.ask(cold[0])
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert "store" in refused.json()["error"]["message"]
        unpublished = live.call("POST", "/v1/loras", json={"path": str(live.folder("late", seed + 99, "lateness"))})
        assert (unpublished.status_code, unpublished.json()["error"]["code"]) == (503, "store_unavailable")
        assert live.text(resident) == whole
    finally:
        live.endpoint.start()
    eventually(lambda: live.ask(cold[0]).status_code == 200)
    eventually(lambda: live.upload(live.folder("late", seed + 99, "lateness")).status_code == 201)
    live.withdraw_all(["late"])


def _is_resident(live: Live, name: str) -> bool:
    digest = live.call("GET", f"/v1/loras/{name}").json()["weights_digest"]
    return any(digest in holdings.resident for holdings in live.on_all("Worker", "load"))


def test_a_new_retriever_replica_is_up_to_date_before_its_first_request(live: Live, seed: int) -> None:
    answer = live.publish(live.folder("rivers", seed, "rivers of the north"))
    assert kill_replicas(APP, "Retriever") == 2
    fence = {"prompt": "Describe rivers of the north.", "lora": {"min_generation": answer["generation"]}}
    eventually(lambda: live.call("POST", "/v1/route", json=fence).status_code == 200, within_s=START_S)
    for _ in range(10):
        assert live.chosen("Describe rivers of the north.") == "rivers"
    live.call("DELETE", "/v1/loras/rivers")
