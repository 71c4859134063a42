"""The deployment without Serve, on a real catalogue. End-to-end tests cover Serve's batching of `route`."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.api.pool_responses import map_body
from deployments.errors import ModelNotFound
from lora_store import AdapterNotFound, AdapterRef, AdapterRefused, Feedback, StoreUnavailable, Trial
from lora_store.events import ActivateEncoder, Embed, Event
from retriever_svc import (
    AskedPrompt,
    Drawn,
    EncoderUnusable,
    PinnedAdapter,
    PlanGone,
    PoolMap,
    PoolSize,
    RouteRequest,
    StaleIndex,
)
from retriever_svc.draws import DrawnAdapter
from retriever_svc.encoder_files import DEFAULT_MODEL
from tests.deployments.served_retriever import ALL, SAMPLES, Served, served
from tests.retriever_svc.pool_fakes import record_of
from tests.tiny_encoder import save_tiny_encoder

MISSING = PinnedAdapter("missing", "0" * 64, 1.0)


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path / "store") as started:
        yield started


@pytest.fixture
def reads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the half second between two reads of the catalogue, which another test measures."""
    monkeypatch.setattr("deployments.retriever._READ_EVERY_S", 0.0)


async def test_a_replica_is_at_the_newest_generation_before_it_is_ready(here: Served) -> None:
    assert await here.replica.catch_up(here.publish(*await here.embedded("german", "sums"))) == 1
    async with served(Path(here.uri)) as second:
        page = await second.replica.page("local", ALL)
        assert (page.generation, [name for name, _ in page.rows]) == (1, ["german", "sums"])
        assert [record.embedding and record.embedding.vector.size for _, record in page.rows] == [0, 0]
        stats = await second.replica.index_stats()
        assert (stats.generation, stats.num_live, stats.num_unlisted, stats.has_lists) == (1, 2, 2, False)


async def test_a_prompt_is_nearest_to_the_adapter_that_it_is_routed_to(here: Served) -> None:
    await here.replica.catch_up(here.publish(*await here.embedded("german", "sums")))
    place = await here.replica.place("local", "How do you say bread in German?", ["german", "sums"])
    german, sums = (abs(point.x - place.prompt.x) for point in place.adapters)
    assert german < sums  # two adapters differ along one axis
    drawn = json.loads(await here.replica.map("local"))
    assert [(point["name"], point["cluster"]) for point in drawn["points"]] == [("german", 0), ("sums", 0)]
    assert await here.replica.load("local") == PoolSize(1, 2)


async def test_a_map_is_written_once_beside_the_event_loop_for_each_state(
    here: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers: list[threading.Thread] = []

    def write(drawn: PoolMap) -> bytes:
        writers.append(threading.current_thread())
        return map_body(drawn)

    monkeypatch.setattr("deployments.retriever.map_body", write)

    def names(body: bytes) -> list[str]:
        return [point["name"] for point in json.loads(body)["points"]]

    german, sums = await here.embedded("german", "sums")
    await here.replica.catch_up(here.publish(german))
    bodies = [await here.replica.map(tenant) for tenant in ("local", "acme", "local", "acme")]
    assert list(map(names, bodies)) == 2 * [["german"], ["local/german"]]
    assert len(writers) == 2 and threading.current_thread() not in writers
    await here.replica.catch_up(here.publish(sums))
    assert names(await here.replica.map("local")) == ["german", "sums"]
    assert len(writers) == 3


async def test_a_route_shows_its_tenants_nearest_samples_where_it_is_asked_to(here: Served) -> None:
    own, theirs = await here.embedded("german", "sums")
    theirs = replace(theirs, ref=replace(theirs.ref, tenant="acme"), approved=True)
    await here.replica.catch_up(here.publish(own, theirs))
    text = "How do you say bread in German?"
    asked = [RouteRequest(text, shows_samples=True), RouteRequest(text)]
    explained, plain = await here.replica.route(asked)
    found = {candidate.ref.name: [sample.text for sample in candidate.samples] for candidate in explained.candidates}
    assert found == {"german": ["How do you say cheese in German?", "Translate to German: good morning."], "sums": []}
    assert [candidate.samples for candidate in plain.candidates] == [(), ()]
    [other] = await here.replica.route([RouteRequest(text, tenant="acme", shows_samples=True)])
    assert {c.ref.name: len(c.samples) for c in other.candidates} == {"german": 0, "sums": 2}
    for path in (Path(here.uri) / "blobs").rglob("*"):
        if path.is_file():
            path.unlink()
    [bare] = await here.replica.route(asked[:1])  # samples only explain
    assert (bare.plan, [candidate.samples for candidate in bare.candidates]) == (plain.plan, [(), ()])


async def test_a_text_has_the_vector_of_length_one_that_routing_uses(here: Served) -> None:
    texts = ["Say bread in German", "Say bread in German", "1 + 2"]
    [german, again, sums] = await here.replica.vectors("local", texts, DEFAULT_MODEL)
    assert (german.dtype, float(german @ german)) == (np.float32, pytest.approx(1, abs=1e-5))
    assert float(german @ again) == pytest.approx(1, abs=1e-5)
    assert float(german @ sums) < 0.9
    load = await here.replica.record_autoscaling_stats()
    assert load["busy"] > 0 and load["waiting_s"] == 0


async def test_the_vectors_of_one_request_are_of_one_encoder_the_one_it_names(
    here: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """More texts than one batch has; another encoder becomes active after the first batch."""
    model = str(save_tiny_encoder(tmp_path / "model"))
    identity = here.pools.prepare_encoder(model, "none").identity
    encode, makers = here.replica._retriever.encode, []

    def encode_and_activate(texts: Any) -> Any:
        encoded = encode(texts)
        makers.append(encoded[0].pool.encoder.identity)
        if len(makers) == 1:
            event = ActivateEncoder(model, identity, "me", datetime.now(UTC))
            here.catalogue.commit(lambda _: [event])
            here.pools.catch_up()
        return encoded

    monkeypatch.setattr(here.replica._retriever, "encode", encode_and_activate)
    with pytest.raises(ModelNotFound, match=r"did you mean 'model'\?"):
        await here.replica.vectors("local", ["the same text"] * 64, DEFAULT_MODEL)
    assert len(set(makers)) == 2
    num_encoded = len(makers)
    with pytest.raises(ModelNotFound):
        await here.replica.vectors("local", ["the same text"], DEFAULT_MODEL)
    assert len(makers) == num_encoded
    event = ActivateEncoder(str(tmp_path / "same"), identity, "me", datetime.now(UTC))  # by another name
    here.catalogue.commit(lambda _: [event])
    here.pools.catch_up()
    with pytest.raises(ModelNotFound):
        await here.replica.vectors("local", ["the same text"], model)
    [first, *others] = await here.replica.vectors("local", ["the same text"] * 64, "same")
    assert all(float(first @ other) == pytest.approx(1, abs=1e-3) for other in others)


async def test_adapters_are_embedded_together_with_the_neighbours_that_their_tenants_see_now(here: Served) -> None:
    german, none = await here.replica.embed([SAMPLES["german"], []], ["local", "local"])
    assert none is None
    assert german is not None
    assert (german.neighbours, len(german.embedding.own_scores)) == ((), 2)
    hidden, sums = await here.embedded("german", "sums")
    await here.replica.catch_up(here.publish(replace(hidden, visibility="private"), sums))
    found = await here.replica.embed([SAMPLES["german"]] * 2, ["local", "other"])
    own, others = [item.neighbours for item in found if item is not None]
    assert [candidate.ref.name for candidate in own] == ["german", "sums"]
    assert own[0].score == pytest.approx(1, abs=1e-5)
    assert [candidate.ref.name for candidate in others] == ["sums"]


@pytest.mark.usefixtures("reads_at_once")
@pytest.mark.parametrize("read", ["plan_named", "page", "record", "map", "place"])
async def test_a_read_with_min_generation_catches_up_first(here: Served, read: str) -> None:
    arguments: dict[str, tuple[Any, ...]] = {
        "plan_named": ([("sums", 1.0)], "mixture"),
        "page": (ALL,),
        "record": ("sums",),
        "map": (),
        "place": ("Add 2 and 3.", ["sums"]),
    }

    async def ask(generation: int) -> Any:
        return await getattr(here.replica, read)("local", *arguments[read], generation)

    generation = here.publish(*await here.embedded("sums"))
    if read in ("plan_named", "record"):
        with pytest.raises(AdapterNotFound):
            await ask(0)
    assert (await here.replica.index_stats()).generation == 0
    answer = await ask(generation)
    if read == "map":
        assert json.loads(answer)["generation"] == generation
    else:
        assert (answer[0] if read == "record" else answer.generation) == generation
    with pytest.raises(StaleIndex) as caught:
        await ask(generation + 1)
    assert (caught.value.wanted, caught.value.found) == (generation + 1, generation)


async def test_source_author_and_trial_of_another_tenants_adapter_are_hidden(here: Served) -> None:
    old = record_of("poet", None, tenant="acme", visibility="private")
    trial = Trial(old.ref.digest, 0.25)
    live = replace(record_of("poet", None, tenant="acme"), ref=replace(old.ref, digest="f" * 64), trial=trial)
    here.publish(old)
    await here.replica.catch_up(here.publish(live, record_of("diary", None, tenant="acme", visibility="private")))
    for tenant, reported in (("acme", ("test", "test", trial)), ("other", ("poet", "", None))):
        [*_, (_, listed)] = (await here.replica.page(tenant, ALL)).rows
        _, [shown, *older] = await here.replica.record(tenant, "poet" if tenant == "acme" else "acme/poet")
        assert [(record.source, record.actor, record.trial) for record in (listed, shown)] == [reported, reported]
        assert [record.ref for record in older] == ([old.ref] if tenant == "acme" else [])
    assert [name for name, _ in (await here.replica.page("other", ALL)).rows] == ["acme/poet"]


async def test_all_reads_wait_together_and_briefly_for_a_hanging_catalogue(
    here: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a patch can make a local catalogue hang, or shorten the wait for it."""
    hangs, calls = threading.Event(), []

    def catch_up() -> int:
        calls.append(None)
        assert hangs.wait(120)
        return 0

    monkeypatch.setattr(here.pools, "catch_up", catch_up)
    monkeypatch.setattr("deployments.retriever._CATCH_UP_S", 1.0)
    waiting = [
        here.replica.catch_up(1),
        here.replica.page("local", ALL, 1),
        here.replica.record("local", "x", 1),
        here.replica.replay("local", "selection", [MISSING], 1),
    ]
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(answer) for answer in answers] == [StaleIndex] * 4
    assert len(calls) == 1
    assert (await here.replica.page("local", ALL)).rows == ()
    hangs.set()


async def test_reads_of_a_future_generation_read_the_catalogue_at_intervals(
    here: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
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
            *[here.replica.replay("local", "selection", [MISSING], 2**62) for _ in range(100)],
        ]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(answer) for answer in answers] == [StaleIndex] * 100 + [PlanGone] * 100
    assert 1 <= len(calls) <= (loop.time() - began) / 0.5 + 2
    generation = here.publish(*await here.embedded("sums"))
    assert (await here.replica.page("local", ALL, generation)).generation == generation  # waits for the next read
    before = len(calls)
    assert await here.replica.catch_up(here.publish(*await here.embedded("sums"))) == generation + 1
    assert len(calls) == before + 1, "a publish does not wait"


@pytest.mark.usefixtures("reads_at_once")
async def test_a_plan_from_the_pool_that_this_one_was_copied_from_is_replayed(here: Served) -> None:
    [sums] = await here.embedded("sums")
    here.publish(sums)
    pinned = [PinnedAdapter("sums", sums.ref.digest, 1.0)]
    plan = await here.replica.replay("local", "selection", pinned, 500)
    assert [row.ref for row in plan.adapters] == [sums.ref]
    with pytest.raises(StaleIndex):
        await here.replica.replay("local", "selection", pinned, 500, min_generation=2)


async def test_a_commit_without_a_broadcast_is_seen_by_the_next_poll(here: Served) -> None:
    here.publish(*await here.embedded("sums"))
    await here.ticks.tick()
    assert (await here.replica.index_stats()).generation == 1
    assert set(here.ticks.intervals_s) == {7.0}
    here.replica.check_health()


async def test_an_outage_is_logged_once_and_serving_continues(
    here: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder does not fail, so the error of a failing endpoint is patched in."""
    caplog.set_level(logging.INFO, "deployments.retriever")

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
        assert caplog.text.count("can be read again") == outage
    here.replica.check_health()


async def test_an_ended_poll_fails_the_health_check(here: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(here.pools, "catch_up", broken)
    tick = asyncio.create_task(here.ticks.tick())
    await asyncio.wait([here.replica._polling])
    tick.cancel()
    with pytest.raises(ZeroDivisionError):
        here.replica.check_health()


async def test_a_reindex_streams_embeddings_and_the_activation_swaps_the_encoder(here: Served, tmp_path: Path) -> None:
    model = str(save_tiny_encoder(tmp_path / "model"))
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


async def test_an_invalid_encoder_is_refused_before_the_first_step(here: Served, tmp_path: Path) -> None:
    with pytest.raises(EncoderUnusable):
        await here.replica.prepare_encoder(str(tmp_path / "nothing"))
    with pytest.raises(EncoderUnusable):
        await anext(here.replica.reindex(str(tmp_path / "nothing")))


async def test_an_outcome_names_the_live_version_before_the_replica_was_told_of_it(here: Served) -> None:
    [german] = await here.embedded("german")
    await here.replica.catch_up(here.publish(german))
    newer = record_of("german", None, version="2")
    here.publish(replace(german, ref=newer.ref, weights_digest=newer.weights_digest))
    outcome = Feedback.of_request("id", "Say bread in German", "local/german", "key", 1.0)
    learnt = await here.replica.learn("local", [outcome])
    assert [[item.ref for item in ranking.adapters] for ranking in learnt.rankings] == [[newer.ref]]


@pytest.mark.usefixtures("reads_at_once")
async def test_the_draws_of_a_version_are_measured_on_the_pool(here: Served) -> None:
    german, sums = await here.embedded("german", "sums")
    copy = replace(german, ref=AdapterRef("mallory", "copy", german.ref.digest), weights_digest="c" * 64)
    generation = here.publish(german, sums, copy)
    draws = await here.replica.draws("acme", "mallory/copy", generation)
    assert draws.adapters == (DrawnAdapter(german.ref, Drawn(2, 2, 2), Drawn(2, 2, 2), pytest.approx(1)),)
    assert draws.ordinary.num == 517
    with pytest.raises(AdapterNotFound):
        await here.replica.draws("acme", f"mallory/copy@{'0' * 64}")
    with pytest.raises(StaleIndex):
        await here.replica.draws("acme", "mallory/copy", generation + 1)


@pytest.mark.usefixtures("reads_at_once")
async def test_a_version_that_another_encoder_embedded_is_not_listed_as_found(here: Served) -> None:
    german, sums = await here.embedded("german", "sums")
    assert german.embedding is not None
    imported = replace(german, embedding=replace(german.embedding, encoder="of-another-pool"))
    page = await here.replica.page("local", ALL, here.publish(imported, sums))
    assert [record.embedding is not None for _, record in page.rows] == [False, True]
    _, [shown, *_] = await here.replica.record("local", "german")
    assert shown.embedding is None


@pytest.mark.usefixtures("reads_at_once")
@pytest.mark.parametrize("has_embedding", [True, False])
async def test_a_version_that_waits_for_a_reindex_is_not_said_to_draw_nothing(
    has_embedding: bool, here: Served
) -> None:
    [german] = await here.embedded("german")
    assert german.embedding is not None
    other = replace(german.embedding, encoder="of-another-pool") if has_embedding else None
    imported = replace(german, ref=AdapterRef("mallory", "copy", german.ref.digest), embedding=other)
    generation = here.publish(german, imported)
    with pytest.raises(AdapterRefused, match="run `loraretriever pool reindex` first"):
        await here.replica.draws("acme", "mallory/copy", generation)
    bare = replace(imported, samples_digest=None, num_samples=0, embedding=None)
    draws = await here.replica.draws("acme", "mallory/copy", here.publish(bare))
    assert draws.ordinary.by_version == 0, "auto never finds it"


async def test_the_doctor_streams_its_progress_routes_real_prompts_and_ends_with_a_report(here: Served) -> None:
    german, sums = await here.embedded("german", "sums")
    await here.replica.catch_up(here.publish(german, sums))
    wanted = [
        AskedPrompt("How do you say cheese in German?", ("german",)),
        AskedPrompt("How do you say cheese in German?", ("sums",)),
        AskedPrompt("Add 12 and 30."),
    ]
    *plain, last = [step async for step in here.replica.doctor("local")]
    assert [(step.num_done, step.num_total, step.report) for step in plain] == [(1, 2, None), (2, 2, None)]
    assert last.report is not None and (last.num_done, last.num_total) == (2, 2)
    assert (last.report.share_first, last.report.generation, len(last.report.adapters)) == (1.0, 1, 2)
    steps = [step async for step in here.replica.doctor("local", wanted)]
    assert [(step.num_done, step.num_total) for step in steps] == [(1, 5), (2, 5), (5, 5), (5, 5)]
    report = steps[-1].report
    assert report is not None and report.asked is not None
    counts = report.asked.labelled
    assert (counts[german.ref].num_right, counts[sums.ref].num_other) == (1, 1)
    assert dict(report.asked.unlabelled) == {sums.ref: 1}
    with pytest.raises(AdapterNotFound):
        await anext(here.replica.doctor("local", [AskedPrompt("x", ("nosuch",))]))
