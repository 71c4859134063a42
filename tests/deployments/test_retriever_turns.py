"""The order of work at the encoder: tenants take turns, and reads do not wait for it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_store import AdapterNotFound, Sample
from retriever_svc import Page, PageRequest, PinnedAdapter, PoolSize, RouteRequest, StaleIndex
from retriever_svc.encoder import CHUNK_TOKENS, MAX_TOKENS, Vectors
from retriever_svc.listing import Listings
from retriever_svc.map_layout import Layout
from tests.deployments.served_retriever import ALL, SAMPLES, Served, served


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path / "store") as started:
        yield started


async def test_names_and_lists_are_answered_while_every_call_of_the_encoder_hangs(
    here: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    [sums] = await here.embedded("sums")
    await here.replica.catch_up(here.publish(sums))
    entered, goes_on = threading.Event(), threading.Event()
    encoder = here.pools.current.encoder
    compute = encoder._compute

    def hang(texts: list[str]) -> Any:
        entered.set()
        assert goes_on.wait(120)
        return compute(texts)

    monkeypatch.setattr(encoder, "_compute", hang)
    routes = [here.replica.route([RouteRequest(f"Add {number}.")]) for number in range(40)]
    places = [here.replica.place("local", f"Add {number}, please.", ["sums"]) for number in range(40)]
    embeds = [here.replica.embed([[Sample(f"Sum {number}.")]], ["local"]) for number in range(40)]
    waiting = [asyncio.ensure_future(call) for call in (*routes, *places, *embeds)]
    assert await asyncio.to_thread(entered.wait, 120)
    pinned = PinnedAdapter("sums", sums.ref.digest, 1.0)
    async with asyncio.timeout(120):
        assert (await here.replica.plan_named("local", [("sums", 1.0)], "selection")).generation == 1
        assert (await here.replica.replay("local", "selection", [pinned], 1)).generation == 1
        assert len((await here.replica.page("local", ALL)).rows) == 1
        assert (await here.replica.record("local", "sums"))[0] == 1
        assert json.loads(await here.replica.map("local"))["num_adapters"] == 1
        assert await here.replica.load("local") == PoolSize(1, 1)
        assert await here.replica.catch_up(here.publish(sums)) == 2
    assert not any(call.done() for call in waiting)
    goes_on.set()
    assert len(await asyncio.gather(*waiting)) == 120


async def test_prompts_are_routed_while_maps_are_drawn(here: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    await here.replica.catch_up(here.publish(*await here.embedded("sums")))
    goes_on, lay_out = threading.Event(), Layout.of

    def hang(vectors: Vectors) -> Layout:
        assert goes_on.wait(120)
        return lay_out(vectors)

    monkeypatch.setattr(Layout, "of", hang)
    maps = [asyncio.ensure_future(here.replica.map("local")) for _ in range(8)]
    async with asyncio.timeout(60):
        [route] = await here.replica.route([RouteRequest("Add 3 and 4.")])
    assert route.candidates and not any(call.done() for call in maps)
    goes_on.set()
    assert [json.loads(drawn)["num_adapters"] for drawn in await asyncio.gather(*maps)] == [1] * 8


async def test_lists_of_one_tenant_hold_up_no_named_request_and_no_list_of_another(
    here: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    await here.replica.catch_up(here.publish(*await here.embedded("sums")))
    goes_on, begun, page = threading.Event(), list[str](), Listings.page

    def hang(lists: Listings, tenant: str, request: PageRequest) -> Page:
        begun.append(tenant)
        assert goes_on.wait(120)
        return page(lists, tenant, request)

    monkeypatch.setattr(Listings, "page", hang)
    listing = [asyncio.ensure_future(here.replica.page(tenant, ALL)) for tenant in "a" * 8 + "b"]
    async with asyncio.timeout(60):
        assert await here.replica.plan_named("local", [("sums", 1.0)], "selection")
    goes_on.set()
    await asyncio.gather(*listing)
    assert begun.index("b") <= 2, "tenants take turns"


async def test_samples_are_shown_to_the_tenant_that_published_them(here: Served) -> None:
    [sums] = await here.embedded("sums")
    theirs = replace(sums, ref=replace(sums.ref, name="theirs", tenant="acme"))
    await here.replica.catch_up(here.publish(sums, theirs))
    assert await here.replica.samples("local", "sums") == SAMPLES["sums"]
    assert await here.replica.samples("acme", "theirs") == SAMPLES["sums"]
    assert await here.replica.samples("local", "acme/theirs") == []
    with pytest.raises(AdapterNotFound):
        await here.replica.samples("local", "nosuch")


async def test_a_tenants_prompt_does_not_wait_for_sixty_large_requests_of_another(
    here: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    await here.replica.catch_up(here.publish(*await here.embedded("sums")))
    encoder = here.pools.current.encoder
    batches: list[Sequence[str]] = []

    def quick(texts: Sequence[str], owners: Sequence[str]) -> Any:
        batches.append(texts)
        return np.ones((len(texts), encoder.dim), np.float32)

    monkeypatch.setattr(encoder, "encode", quick)
    large = [
        asyncio.ensure_future(
            here.replica.route([RouteRequest(f"{call} {n} " + "x" * 5000, tenant="flood") for n in range(60)])
        )
        for call in range(60)
    ]
    await asyncio.sleep(0)
    before = len(batches)
    [route] = await here.replica.route([RouteRequest("Add 2 and 3.", tenant="small")])
    assert route.generation == 1
    [own] = [number for number, texts in enumerate(batches) if "Add 2 and 3." in texts]
    assert own - before <= 2, "at most the batch in progress, and one that had already begun, come first"
    for call in large:
        call.cancel()


class Gate:
    """Lets the encoder's passes start when the test says so, and records their texts."""

    def __init__(self, encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: list[list[str]] = []
        self._entered, self._goes_on = threading.Event(), threading.Event()
        self._encoder = encoder
        monkeypatch.setattr(encoder, "_compute", self._compute)

    def _compute(self, texts: list[str]) -> Any:
        self.passes.append(texts)
        self._entered.set()
        assert self._goes_on.wait(120)
        return np.ones((len(texts), self._encoder.dim), np.float32)

    async def entered(self) -> None:
        assert await asyncio.to_thread(self._entered.wait, 120)

    async def a_caller_waits(self) -> None:
        while not self._encoder._thread._work_queue.qsize():
            await asyncio.sleep(0.01)

    def open(self) -> None:
        self._goes_on.set()

    def places(self, part: str) -> list[int]:
        """Return the numbers of the passes with such a text."""
        return [number for number, texts in enumerate(self.passes) if any(part in text for text in texts)]


def long_texts(name: str, count: int) -> list[str]:
    """Return texts that share no wording, so that each is encoded once."""
    return [f"{name} {number} {'x' * 5000} {number}" for number in range(count)]


async def test_a_prompts_batch_waits_for_one_small_chunk_of_a_publish(
    here: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    await here.replica.catch_up(here.publish(*await here.embedded("sums")))
    gate = Gate(here.pools.current.encoder, monkeypatch)
    publish = asyncio.ensure_future(here.replica.embed([list(map(Sample, long_texts("sample", 64)))], ["flood"]))
    await gate.entered()
    prompts = [RouteRequest(text, tenant="small") for text in long_texts("prompt", 6)]
    route = asyncio.ensure_future(here.replica.route(prompts))
    await gate.a_caller_waits()
    gate.open()
    assert len(await route) == 6
    [embedded] = await publish
    assert embedded is not None and len(embedded.embedding.own_scores) == 64
    assert gate.places("prompt") == [1, 2], "after the chunk in progress, and nothing in between"
    assert max(map(len, gate.passes)) * MAX_TOKENS <= CHUNK_TOKENS
    assert sum(map(len, gate.passes)) == 70


async def test_tenants_that_publish_take_turns(here: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(here.pools.current.encoder, monkeypatch)
    flood = [
        asyncio.ensure_future(here.replica.embed([list(map(Sample, long_texts(f"flood {call}", 16)))], ["flood"]))
        for call in range(20)
    ]
    await gate.entered()
    small = asyncio.ensure_future(here.replica.embed([list(map(Sample, long_texts("small", 8)))], ["small"]))
    await asyncio.sleep(0)
    gate.open()
    await asyncio.gather(small, *flood)
    first, second = gate.places("small")
    assert first <= 2 and second <= 4, "one chunk of the other tenant between two of its own"
    assert len(gate.passes) == 20 * 4 + 2


async def test_a_prompt_with_min_generation_does_not_delay_others(here: Served) -> None:
    with pytest.raises(StaleIndex) as caught:
        await here.replica.route([RouteRequest("Translate to German: the dog.", min_generation=2)])
    assert (caught.value.wanted, caught.value.found) == (2, 0)
