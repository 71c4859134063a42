"""The deployment without Serve, on a real catalogue. Serve's batching of `route` is what the e2e tests run."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.config import AppConfig, RetrievalSettings
from deployments.retriever import RetrieverDeployment
from lora_store import (
    ActivateEncoder,
    AdapterNotFound,
    AdapterRecord,
    Catalogue,
    Embed,
    Embedding,
    Event,
    Publish,
    Sample,
    StoreUnavailable,
)
from lora_store.blobs import BlobStore
from lora_store.location import Location
from lora_store.sample_files import write_samples
from retriever_svc import EncoderUnusable, PageRequest, PinnedAdapter, RouteRequest, StaleIndex
from retriever_svc.encoder import CHUNK_TOKENS, MAX_TOKENS
from retriever_svc.encoder_files import model_folder
from tests.retriever_svc.pool_fakes import record_of

SAMPLES = {
    "german": [Sample("Translate to German: good morning."), Sample("How do you say cheese in German?")],
    "sums": [Sample("What is 3 + 4?"), Sample("Add 12 and 30.")],
}
ALL = PageRequest(100)


class Ticks:
    """A sleep that ends when the test says so, once the task that slept before has done its work."""

    def __init__(self) -> None:
        self.intervals_s: list[float] = []
        self._asleep, self._wake = asyncio.Event(), asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        self.intervals_s.append(seconds)
        self._asleep.set()
        await self._wake.wait()
        self._wake.clear()

    async def tick(self) -> None:
        """One interval passes, and what it brought is done."""
        await self._asleep.wait()
        self._asleep.clear()
        self._wake.set()
        await self._asleep.wait()


class Served:
    """A replica, the catalogue it reads, and its clock."""

    def __init__(self, folder: Path) -> None:
        self.uri, self.ticks = str(folder), Ticks()
        self.catalogue = Catalogue(Location(self.uri).child("catalogue"))
        config = AppConfig(store_uri=self.uri, retrieval=RetrievalSettings(encoder_threads=1, poll_interval_s=7.0))
        self.replica = RetrieverDeployment(config, sleep=self.ticks.sleep)

    def publish(self, *records: AdapterRecord) -> int:
        events: list[Event] = [Publish(record) for record in records]
        return self.catalogue.commit(lambda snapshot: events)

    async def embedded(self, *names: str) -> list[AdapterRecord]:
        """Records as a publish would commit them, their samples in the store."""
        found = await self.replica.embed([SAMPLES[name] for name in names], ["local"] * len(names))
        return [self._record(name, item.embedding) for name, item in zip(names, found, strict=True) if item is not None]

    def _record(self, name: str, embedding: Embedding) -> AdapterRecord:
        digest = BlobStore(Location(self.uri).child("blobs")).put(write_samples(SAMPLES[name]))
        return replace(record_of(name, None), samples_digest=digest, num_samples=2, embedding=embedding)

    @property
    def pools(self) -> Any:
        return self.replica._pools


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[Served]:
    started = Served(folder)
    try:
        yield started
    finally:
        started.replica._polling.cancel()


def run(folder: Path, scenario: Callable[[Served], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with served(folder) as started:
            await asyncio.wait_for(scenario(started), 60)

    asyncio.run(main())


def test_a_replica_is_at_the_newest_generation_before_it_is_ready(tmp_path: Path) -> None:
    async def first(here: Served) -> None:
        assert await here.replica.catch_up(here.publish(*await here.embedded("german", "sums"))) == 1

    async def second(here: Served) -> None:
        page = await here.replica.page("local", ALL)
        assert (page.generation, [name for name, _ in page.rows]) == (1, ["german", "sums"])
        assert [record.embedding for _, record in page.rows] == [None, None]  # they stay here
        stats = await here.replica.index_stats()
        assert (stats.generation, stats.num_live, stats.num_unlisted, stats.has_lists) == (1, 2, 2, False)

    run(tmp_path, first)
    run(tmp_path, second)


def test_a_prompt_lies_nearest_to_the_adapter_it_is_routed_to(tmp_path: Path) -> None:
    async def scenario(here: Served) -> None:
        await here.replica.catch_up(here.publish(*await here.embedded("german", "sums")))
        place = await here.replica.place("local", "How do you say bread in German?", ["german", "sums"])
        german, sums = (abs(point.x - place.prompt.x) for point in place.adapters)
        assert german < sums  # two adapters differ along one axis
        drawn = await here.replica.map("local")
        assert (drawn.num_adapters, round(drawn.shown_variance, 5)) == (2, 1)
        assert await here.replica.load("local") == (1, 2)

    run(tmp_path, scenario)


def test_adapters_are_embedded_together_with_the_neighbours_they_have_now(tmp_path: Path) -> None:
    async def scenario(here: Served) -> None:
        german, none = await here.replica.embed([SAMPLES["german"], []], ["local", "local"])
        assert none is None
        assert german is not None
        assert (german.neighbours, len(german.embedding.own_scores)) == ((), 2)
        await here.replica.catch_up(here.publish(*await here.embedded("german", "sums")))
        [again] = await here.replica.embed([SAMPLES["german"]], ["local"])
        assert again is not None
        assert [candidate.ref.name for candidate in again.neighbours] == ["german", "sums"]
        assert again.neighbours[0].score == pytest.approx(1, abs=1e-5)

    run(tmp_path, scenario)


@pytest.mark.parametrize("read", ["plan_named", "page", "record", "map", "place"])
def test_a_read_that_names_a_generation_catches_up_first(tmp_path: Path, read: str) -> None:
    async def scenario(here: Served) -> None:
        def ask(generation: int) -> Coroutine[Any, Any, Any]:
            if read == "plan_named":
                return here.replica.plan_named("local", [("sums", 1.0)], "mixture", generation)
            if read == "page":
                return here.replica.page("local", ALL, generation)
            if read == "map":
                return here.replica.map("local", generation)
            if read == "place":
                return here.replica.place("local", "Add 2 and 3.", ["sums"], generation)
            return here.replica.record("local", "sums", generation)

        generation = here.publish(*await here.embedded("sums"))
        if read in ("plan_named", "record"):
            with pytest.raises(AdapterNotFound):
                await ask(0)
        assert (await here.replica.index_stats()).generation == 0
        answer = await ask(generation)
        assert (answer[0] if read == "record" else answer.generation) == generation
        with pytest.raises(StaleIndex) as caught:
            await ask(generation + 1)
        assert (caught.value.wanted, caught.value.found) == (generation + 1, generation)

    run(tmp_path, scenario)


def test_of_anothers_adapter_neither_its_source_nor_who_published_it_is_told(tmp_path: Path) -> None:
    async def scenario(here: Served) -> None:
        public = record_of("poet", None, tenant="acme")
        await here.replica.catch_up(here.publish(public, record_of("diary", None, tenant="acme", visibility="private")))
        for tenant, told in (("acme", ("test", "test")), ("other", ("poet", ""))):
            [*_, (_, listed)] = (await here.replica.page(tenant, ALL)).rows
            _, [shown] = await here.replica.record(tenant, "poet")
            assert [(record.source, record.actor) for record in (listed, shown)] == [told, told]
        assert [name for name, _ in (await here.replica.page("other", ALL)).rows] == ["acme/poet"]

    run(tmp_path, scenario)


def test_neighbours_are_those_the_publishing_tenant_sees(tmp_path: Path) -> None:
    async def scenario(here: Served) -> None:
        [german] = await here.embedded("german")
        theirs = replace(german, ref=replace(german.ref, tenant="acme"), visibility="private")
        await here.replica.catch_up(here.publish(theirs))
        found = await here.replica.embed([SAMPLES["german"]] * 2, ["acme", "other"])
        assert [len(item.neighbours) for item in found if item is not None] == [1, 0]

    run(tmp_path, scenario)


def test_a_name_has_its_kept_versions(tmp_path: Path) -> None:
    async def scenario(here: Served) -> None:
        [old] = await here.embedded("sums")
        here.publish(old)
        new = replace(old, ref=replace(old.ref, digest="f" * 64))
        generation, versions = await here.replica.record("local", "sums", here.publish(new))
        assert generation == 2
        assert [version.ref for version in versions] == [new.ref, old.ref]
        assert versions[0].embedding is None
        plan = await here.replica.plan_named("local", [(f"sums@{old.ref.digest[:8]}", 1.0)], "selection")
        assert plan.adapters[0].ref == old.ref

    run(tmp_path, scenario)


def test_a_catalogue_that_hangs_is_waited_for_a_while_by_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but a patch makes a local catalogue hang, or the bound on waiting for it short."""

    async def scenario(here: Served) -> None:
        hangs, calls = threading.Event(), []

        def catch_up() -> int:
            calls.append(None)
            assert hangs.wait(30)
            return 0

        monkeypatch.setattr(here.pools, "catch_up", catch_up)
        monkeypatch.setattr("deployments.retriever._CATCH_UP_S", 1.0)
        waiting = [here.replica.catch_up(1), here.replica.page("local", ALL, 1), here.replica.record("local", "x", 1)]
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(answer) for answer in answers] == [StaleIndex] * 3
        assert len(calls) == 1
        assert (await here.replica.page("local", ALL)).rows == ()
        hangs.set()

    run(tmp_path, scenario)


def test_a_generation_beyond_the_newest_reads_the_catalogue_now_and_then_however_many_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(here: Served) -> None:
        calls, catch_up = [], here.pools.catch_up

        def counted() -> int:
            calls.append(None)
            return int(catch_up())

        monkeypatch.setattr(here.pools, "catch_up", counted)
        loop = asyncio.get_running_loop()
        began = loop.time()
        for _ in range(2):
            asked = [
                *[here.replica.page("local", ALL, 2**62) for _ in range(100)],
                *[here.replica.replay("local", "base", [], 2**62) for _ in range(100)],
            ]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            assert {type(answer) for answer in answers} == {StaleIndex}
        assert 1 <= len(calls) <= (loop.time() - began) / 0.5 + 2
        generation = here.publish(*await here.embedded("sums"))
        assert (await here.replica.page("local", ALL, generation)).generation == generation  # waits for the next read
        before = len(calls)
        assert await here.replica.catch_up(here.publish(*await here.embedded("sums"))) == generation + 1
        assert len(calls) == before + 1, "a publish does not wait"

    run(tmp_path, scenario)


def test_a_commit_nobody_told_of_is_seen_by_the_next_poll(tmp_path: Path) -> None:
    async def scenario(here: Served) -> None:
        here.publish(*await here.embedded("sums"))
        await here.ticks.tick()
        assert (await here.replica.index_stats()).generation == 1
        assert set(here.ticks.intervals_s) == {7.0}
        here.replica.check_health()

    run(tmp_path, scenario)


def test_an_outage_is_logged_once_and_serving_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder does not go down; what the store says when an endpoint does is patched in."""
    caplog.set_level(logging.INFO, "deployments.retriever")

    async def scenario(here: Served) -> None:
        def down() -> int:
            raise StoreUnavailable("endpoint stopped")

        await here.replica.catch_up(here.publish(*await here.embedded("sums")))
        for outage in (1, 2):
            with monkeypatch.context() as patch:
                patch.setattr(here.pools, "catch_up", down)
                for _ in range(3):
                    await here.ticks.tick()
                assert (await here.replica.plan_named("local", [("sums", 1.0)], "selection")).generation == 1
                with pytest.raises(StoreUnavailable):
                    await here.replica.catch_up(2)
            await here.ticks.tick()
            assert caplog.text.count("endpoint stopped") == outage
            assert caplog.text.count("is read again") == outage
        here.replica.check_health()

    run(tmp_path, scenario)


def test_a_poll_that_died_is_ill_health(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(here: Served) -> None:
        def broken() -> int:
            raise ZeroDivisionError

        monkeypatch.setattr(here.pools, "catch_up", broken)
        tick = asyncio.create_task(here.ticks.tick())
        await asyncio.wait([here.replica._polling])
        tick.cancel()
        with pytest.raises(ZeroDivisionError):
            here.replica.check_health()

    run(tmp_path, scenario)


def short_encoder(folder: Path) -> str:
    """Another encoder: the packaged one, which reads fewer tokens."""
    shutil.copytree(model_folder("all-MiniLM-L6-v2"), folder)
    config = folder / "sentence_bert_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_seq_length": 32}))
    return str(folder)


def test_a_reindex_streams_embeddings_and_the_activation_swaps_the_encoder(tmp_path: Path) -> None:
    model = short_encoder(tmp_path / "model")

    async def scenario(here: Served) -> None:
        await here.replica.catch_up(here.publish(*await here.embedded("german", "sums")))
        before = await here.replica.index_stats()
        steps = [step async for step in here.replica.reindex(model)]
        assert [(step.num_done, step.num_total, step.unreadable) for step in steps] == [(2, 2, ())]
        events: list[Event] = [Embed(ref, e) for step in steps for ref, e in step.embeddings.items()]
        await here.replica.catch_up(here.catalogue.commit(lambda snapshot: events))
        assert [step async for step in here.replica.reindex(model)] == []
        identity = await here.replica.prepare_encoder(model)
        assert identity != before.encoder == (await here.replica.index_stats()).encoder
        created_at = record_of("x", None).created_at
        activate: list[Event] = [ActivateEncoder(model, identity, "me", created_at)]
        await here.replica.catch_up(here.catalogue.commit(lambda snapshot: activate))
        after = await here.replica.index_stats()
        assert (after.encoder, after.num_live, after.generation) == (identity, 2, 3)
        [german] = await here.replica.embed([SAMPLES["german"]], ["local"])
        assert german is not None
        assert (german.embedding.encoder, german.neighbours[0].ref.name) == (identity, "german")

    run(tmp_path / "store", scenario)


def test_an_encoder_that_is_none_is_refused_before_anything_streams(tmp_path: Path) -> None:
    async def scenario(here: Served) -> None:
        with pytest.raises(EncoderUnusable):
            await here.replica.prepare_encoder(str(tmp_path / "nothing"))
        with pytest.raises(EncoderUnusable):
            await anext(here.replica.reindex(str(tmp_path / "nothing")))

    run(tmp_path, scenario)


def test_the_doctor_streams_its_progress_and_ends_with_a_report(tmp_path: Path) -> None:
    async def scenario(here: Served) -> None:
        await here.replica.catch_up(here.publish(*await here.embedded("german", "sums")))
        steps = [step async for step in here.replica.doctor("local")]
        assert [(step.num_done, step.num_total, step.report is None) for step in steps] == [
            (1, 2, True),
            (2, 2, True),
            (2, 2, False),
        ]
        report = steps[-1].report
        assert report is not None
        assert (report.share_first, report.generation, len(report.adapters)) == (1.0, 1, 2)

    run(tmp_path, scenario)


def test_names_and_lists_are_answered_while_every_call_of_the_encoder_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(here: Served) -> None:
        [sums] = await here.embedded("sums")
        await here.replica.catch_up(here.publish(sums))
        entered, goes_on = threading.Event(), threading.Event()
        encoder = here.pools.current.encoder
        compute = encoder._compute

        def hang(texts: list[str]) -> Any:
            entered.set()
            assert goes_on.wait(30)
            return compute(texts)

        monkeypatch.setattr(encoder, "_compute", hang)
        routes = [here.replica.route([RouteRequest(f"Add {number}.")]) for number in range(40)]
        places = [here.replica.place("local", f"Add {number}, please.", ["sums"]) for number in range(40)]
        embeds = [here.replica.embed([[Sample(f"Sum {number}.")]], ["local"]) for number in range(40)]
        waiting = [asyncio.ensure_future(call) for call in (*routes, *places, *embeds)]
        assert await asyncio.to_thread(entered.wait, 20)
        pinned = PinnedAdapter("sums", sums.ref.digest, 1.0)
        async with asyncio.timeout(20):
            assert (await here.replica.plan_named("local", [("sums", 1.0)], "selection")).generation == 1
            assert (await here.replica.replay("local", "selection", [pinned], 1)).generation == 1
            assert len((await here.replica.page("local", ALL)).rows) == 1
            assert (await here.replica.record("local", "sums"))[0] == 1
            assert (await here.replica.map("local")).num_adapters == 1
            assert await here.replica.load("local") == (1, 1)
            assert await here.replica.catch_up(here.publish(sums)) == 2
        assert not any(call.done() for call in waiting)
        goes_on.set()
        assert len(await asyncio.gather(*waiting)) == 120

    run(tmp_path, scenario)


def test_a_tenants_prompt_does_not_wait_behind_anothers_sixty_large_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(here: Served) -> None:
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
        assert len(batches) - before <= 3, "the batch in progress, its own, and one that had begun by then"
        assert sum(call.done() for call in large) < 10
        for call in large:
            call.cancel()

    run(tmp_path, scenario)


class Gate:
    """Lets the encoder's passes begin when the test says so, and keeps their texts."""

    def __init__(self, encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: list[list[str]] = []
        self._entered, self._goes_on = threading.Event(), threading.Event()
        self._encoder = encoder
        monkeypatch.setattr(encoder, "_compute", self._compute)

    def _compute(self, texts: list[str]) -> Any:
        self.passes.append(texts)
        self._entered.set()
        assert self._goes_on.wait(30)
        return np.ones((len(texts), self._encoder.dim), np.float32)

    async def entered(self) -> None:
        assert await asyncio.to_thread(self._entered.wait, 20)

    async def somebody_waits(self) -> None:
        while not self._encoder._model_turn._turns:
            await asyncio.sleep(0.01)

    def open(self) -> None:
        self._goes_on.set()

    def places(self, part: str) -> list[int]:
        """The numbers of the passes with such a text."""
        return [number for number, texts in enumerate(self.passes) if any(part in text for text in texts)]


def long_texts(name: str, count: int) -> list[str]:
    return [f"{name} {number} " + "x" * 5000 for number in range(count)]


def test_a_prompts_batch_waits_for_one_small_chunk_of_a_publish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(here: Served) -> None:
        await here.replica.catch_up(here.publish(*await here.embedded("sums")))
        gate = Gate(here.pools.current.encoder, monkeypatch)
        publish = asyncio.ensure_future(here.replica.embed([list(map(Sample, long_texts("sample", 64)))], ["flood"]))
        await gate.entered()
        prompts = [RouteRequest(text, tenant="small") for text in long_texts("prompt", 6)]
        route = asyncio.ensure_future(here.replica.route(prompts))
        await gate.somebody_waits()
        gate.open()
        assert len(await route) == 6
        [embedded] = await publish
        assert embedded is not None and len(embedded.embedding.own_scores) == 64
        assert gate.places("prompt") == [1, 2], "after the chunk in progress, and nothing in between"
        assert max(map(len, gate.passes)) * MAX_TOKENS <= CHUNK_TOKENS
        assert sum(map(len, gate.passes)) == 70

    run(tmp_path, scenario)


def test_tenants_that_publish_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(here: Served) -> None:
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

    run(tmp_path, scenario)


def test_a_prompt_that_names_a_generation_waits_for_no_batch_without_it(tmp_path: Path) -> None:
    async def scenario(here: Served) -> None:
        with pytest.raises(StaleIndex) as caught:
            await here.replica.route([RouteRequest("Translate to German: the dog.", min_generation=2)])
        assert (caught.value.wanted, caught.value.found) == (2, 0)

    run(tmp_path, scenario)
