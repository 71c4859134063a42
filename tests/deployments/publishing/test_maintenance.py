"""A reindex: rounds of embeddings, the encoder on every replica, and one swap."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from deployments.publishing import maintenance
from deployments.publishing.learning import Learning
from lora_store import EncoderIncomplete, Feedback
from retriever_svc import EncoderUnusable
from tests.deployments.adapter_records import POOL
from tests.deployments.app_fakes import serve_plainly
from tests.deployments.asking import asked, lines_of, post
from tests.deployments.fake_retriever import FakeRetriever, reindex_step
from tests.deployments.fake_store import FakeStore

POET, CODER = (record.ref for record in POOL)


async def no_pause(seconds: float) -> None:
    await asyncio.sleep(0)


async def test_a_reindex_embeds_prepares_every_replica_then_swaps_and_waits_for_all() -> None:
    retriever = FakeRetriever(steps=[[reindex_step(1, 2, POET), reindex_step(2, 2, CODER)]])
    async with asked(retriever=retriever) as (client, served):
        response = await client.post("/v1/pool/reindex", json={"encoder": "other"})
        *progress, last = lines_of(response)
        assert progress == [{"done": 1, "total": 2}, {"done": 2, "total": 2}]
        assert last["result"] == {
            "encoder": "other",
            "identity": "other-encoder",
            "generation": 10,
            "replicas": {"ready": 1, "behind": 0},
        }
        calls = sorted(served.store.calls + served.retriever.calls, key=lambda call: call.number)
        assert [call.name for call in calls] == [
            "ping",
            "reindex",
            "add_embeddings",
            "add_embeddings",
            "prepare_encoder",
            "activate_encoder",
            "catch_up",
        ]
        assert served.store.called("activate_encoder") == [("other", "other-encoder", "local")]


async def test_a_refit_comes_first_and_its_projection_is_embedded_and_activated() -> None:
    async with asked(retriever=FakeRetriever(steps=[[reindex_step(1, 1, POET)]])) as (client, served):
        await client.post("/v1/pool/reindex", json={"encoder": "other", "projection": "refit"})
        names = [call.name for call in served.retriever.calls]
        assert names[names.index("refit") : names.index("refit") + 2] == ["refit", "reindex"]
        assert served.retriever.called("reindex") == [("other", "other+fitted")]
        assert served.retriever.called("prepare_encoder") == [("other", "other+fitted")]


async def test_applied_outcomes_of_every_tenant_are_applied_again_with_the_new_encoders_vectors() -> None:
    store = FakeStore()
    async with asked(store=store, retriever=FakeRetriever(steps=[[reindex_step(1, 1, POET)]])) as (_, served):
        pool, said = served.services, Feedback.of_request("id", "Rhyme.", None, "key", 1.0)
        retriever = FakeRetriever(encoder="other-encoder")
        await pool.store.put_feedback("acme", "outcome", said)
        applied = (await FakeRetriever().learn("acme", [said])).rankings
        store.ranked = [("acme", applied), ("measured", [replace(applied[0], anchor=POET)])]
        learning = Learning(pool.store, retriever, pool.publisher, pool.background, applies=True, sleep=no_pause)
        job = maintenance.reindex(pool.publisher, pool.store, pool.retriever, learning, "other", "tester")
        assert "result" in [line async for line in job][-1]
    assert [(tenant, [ranking.encoder for ranking in rankings]) for tenant, rankings in store.ranked[2:]] == [
        ("acme", ["other-encoder"])
    ]


async def test_adapters_published_meanwhile_are_embedded_in_rounds_that_name_the_encoder_that_is_loaded() -> None:
    retriever = FakeRetriever(steps=[[reindex_step(1, 1, POET)] for _ in range(3)])
    store = FakeStore(incomplete=[EncoderIncomplete([CODER]) for _ in range(2)])
    async with asked(retriever=retriever, store=store) as (client, served):
        response = await client.post("/v1/pool/reindex", json={"encoder": "other"})
        *progress, last = lines_of(response)
        assert (progress, last["result"]["generation"]) == ([{"done": 1, "total": 1}] * 3, 11)
        wanted = [("other", "auto"), *[("other", "other-encoder")] * 2]
        assert served.retriever.called("reindex") == served.retriever.called("prepare_encoder") == wanted


def test_an_adapter_that_can_never_be_embedded_ends_the_reindex_and_the_old_encoder_stays() -> None:
    retriever = FakeRetriever(steps=[[reindex_step(2, 2, POET, unreadable=(CODER,))], []])
    store = FakeStore(incomplete=[EncoderIncomplete([CODER])])
    *_, last = lines_of(post("/v1/pool/reindex", {"encoder": "other"}, retriever=retriever, store=store))
    assert last["error"]["code"] == "unavailable"
    assert (store.encoder, len(retriever.steps)) == (None, 1)


def test_a_pool_that_keeps_growing_ends_the_reindex_in_time() -> None:
    retriever = FakeRetriever(steps=[[reindex_step(1, 1, POET)] for _ in range(99)])
    store = FakeStore(incomplete=[EncoderIncomplete([CODER]) for _ in range(99)])
    *progress, last = lines_of(post("/v1/pool/reindex", {"encoder": "other"}, retriever=retriever, store=store))
    assert last["error"]["code"] == "unavailable"
    assert "1 live adapters" in last["error"]["message"]
    assert 1 < len(progress) < 10


@pytest.mark.parametrize(
    ("others", "code"),
    [
        ([EncoderUnusable("other", "no such folder")], "invalid_request"),
        (["another-identity"], "invalid_request"),
        ([RayActorError()], None),
    ],
)
def test_an_encoder_that_a_replica_cannot_load_is_not_activated(others: list[Any], code: str | None) -> None:
    async def run() -> list[dict[str, Any]]:
        replicas = [
            FakeRetriever(steps=[[reindex_step(1, 1, POET)]]),
            *[FakeRetriever(prepared=other) for other in others],
        ]
        served = serve_plainly(retrievers=replicas)
        try:
            pool = served.services
            lines = maintenance.reindex(pool.publisher, pool.store, pool.retriever, pool.learning, "other", "tester")
            return [line async for line in lines]
        finally:
            assert (served.store.called("activate_encoder") == []) is (code is not None)

    if code is None:
        assert "result" in asyncio.run(run())[-1]
    else:
        with pytest.raises(EncoderUnusable):
            asyncio.run(run())
