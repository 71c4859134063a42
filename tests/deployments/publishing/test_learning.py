"""Accepting, rejecting and undoing samples, and applying outcomes, over fakes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from deployments.http.api import finish_at_end
from deployments.publishing.learning import QUIET_S, REST_FACTOR, RETRY_S, Learning, counted
from lora_store import Feedback, StoreUnavailable, VersionConflict
from retriever_svc.learning import Effect, Learnt
from tests.deployments.adapter_records import POOL, pool_of
from tests.deployments.asking import asked, error_of
from tests.deployments.fake_retriever import FakeRetriever
from tests.deployments.fake_store import FakeStore

PATH = "/v1/loras/poet/samples"


def proposals(*texts: str) -> list[Feedback]:
    return [Feedback.proposed(text, "poet", "key") for text in texts]


def store_with(*texts: str, **fields: Any) -> FakeStore:
    store = FakeStore(pool_of(*POOL), **fields)
    store.given = {("local", "proposed", item.id): item for item in proposals(*texts)}
    return store


async def change(store: FakeStore, body: dict[str, Any], **options: Any) -> httpx.Response:
    async with asked(store=store, **options) as (client, _):
        return await client.post(PATH, json=body)


async def waiting(store: FakeStore) -> list[str]:
    return [item.text for item in await store.feedback("local", "proposed", "poet")]


async def test_accepting_publishes_the_same_weights_and_the_proposal_is_gone() -> None:
    store = store_with("Rhyme.", "Sing.")
    response = await change(store, {"action": "accept", "ids": [proposals("Sing.")[0].id]})
    [live, before] = store.live["local", "poet"]
    assert (response.status_code, response.json()["digest"]) == (201, live.ref.digest)
    assert live.ref.digest != before.ref.digest == POOL[0].ref.digest
    assert (live.weights_digest, live.num_samples, live.actor) == (before.weights_digest, 5, "local")
    assert (await waiting(store), store.held) == (["Rhyme."], [])


async def test_accepting_names_no_proposal_for_all_of_them() -> None:
    store = store_with("Rhyme.", "Sing.")
    assert (await change(store, {"action": "accept"})).status_code == 201
    assert (store.live["local", "poet"][0].num_samples, await waiting(store)) == (6, [])


@pytest.mark.parametrize(
    ("texts", "body", "retriever", "says"),
    [
        ((), {"action": "accept"}, {}, "no prompt is proposed for 'poet'"),
        (("Rhyme.",), {"action": "accept", "ids": ["nonsense"]}, {}, "no prompt 'nonsense' is proposed"),
        (("Rhyme.",), {"action": "reject", "ids": ["nonsense"]}, {}, "no prompt 'nonsense' is proposed"),
        (("Rhyme.",), {"action": "undo", "ids": ["x"]}, {}, "cannot be combined"),
        (("Rhyme.",), {"action": "praise"}, {}, "action"),
        (("Rhyme.",), {"action": "accept"}, {"num_own": 2}, "it has 2 published samples, but needs 3"),
        (("Rhyme.",), {"action": "accept"}, {"effect": Effect(50, 40, 39, 400, 1, 1)}, "1 of 50 samples"),
    ],
)
async def test_what_cannot_be_done_is_refused_and_changes_nothing(
    texts: tuple[str, ...], body: dict[str, Any], retriever: dict[str, Any], says: str
) -> None:
    store = store_with(*texts)
    response = await change(store, body, retriever=FakeRetriever(**retriever))
    assert response.status_code == 400
    assert says in error_of(response)["message"]
    assert (await waiting(store), len(store.live["local", "poet"]), store.held) == (list(texts), 1, [])


async def test_a_version_that_was_published_meanwhile_is_kept() -> None:
    store = store_with("Rhyme.", failing={"commit": (VersionConflict(1), 9)})
    response = await change(store, {"action": "accept"})
    assert (response.status_code, error_of(response)["code"]) == (503, "overloaded")
    assert (await waiting(store), store.held) == (["Rhyme."], [])


async def test_a_rejected_proposal_is_gone_and_makes_no_version() -> None:
    store = store_with("Rhyme.", "Sing.")
    response = await change(store, {"action": "reject", "ids": [proposals("Rhyme.")[0].id]})
    assert (response.status_code, response.json()["num_rejected"]) == (200, 1)
    assert (await waiting(store), len(store.live["local", "poet"])) == (["Sing."], 1)


class BrokenForOne(FakeRetriever):
    """It cannot apply the outcomes of `broken`, nor at first those of `late`, and does not end for `stuck`."""

    def __init__(self) -> None:
        super().__init__()
        self.learning: list[str] = []

    async def learn(self, tenant: str, outcomes: Sequence[Feedback]) -> Learnt:
        self.learning.append(tenant)
        if tenant == "broken" or (tenant == "late" and self.learning.count("late") <= 2):
            raise StoreUnavailable("down")
        if tenant == "stuck":
            await asyncio.Event().wait()
        return await super().learn(tenant, outcomes)


async def applied_for(*tenants: str, took_s: float = 0.0, num_applied: int = 0) -> tuple[list[str], list[float]]:
    """Let each tenant judge a request. Return those whose outcomes are applied, in order, and the pauses.

    With `num_applied` applications take no more than a few seconds, and a tenant that rests does so for ever.
    """
    times, pauses = itertools.count(), list[float]()
    store, noted = store_with(), Feedback.of_request("id", "Rhyme.", None, "key")
    store.given = {(tenant, "asked", noted.id): noted for tenant in tenants}

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        if num_applied and seconds > QUIET_S:
            await asyncio.Event().wait()

    async with asked(store=store) as (_, served):
        services = served.services
        learning = Learning(
            store,
            BrokenForOne(),
            services.publisher,
            services.background,
            applies=True,
            sleep=pause,
            clock=lambda: took_s * next(times),
        )
        for tenant in tenants:
            await learning.judge(tenant, ("id", None, 1.0), "key")
        if num_applied:
            async with asyncio.timeout(5):
                while len(store.ranked) < num_applied:
                    await asyncio.sleep(0.01)
            services.background.cancel()
    return [tenant for tenant, _ in store.ranked], pauses


async def test_outcomes_apply_in_the_order_of_arrival() -> None:
    assert (await applied_for("quiet", "loud"))[0] == ["quiet", "loud"]


async def test_a_tenant_whose_outcomes_cannot_be_applied_keeps_no_other_from_it() -> None:
    assert (await applied_for("well", "broken", "also well", num_applied=2))[0] == ["well", "also well"]


async def test_outcomes_that_could_not_be_applied_are_applied_after_growing_pauses() -> None:
    rest_s = 5.0 * REST_FACTOR
    failures = [QUIET_S, rest_s + RETRY_S, QUIET_S, rest_s + 2 * RETRY_S]
    assert await applied_for("late", took_s=5.0) == (["late"], [*failures, QUIET_S, rest_s])


async def test_applying_rests_in_proportion_to_its_time() -> None:
    assert (await applied_for("one", took_s=5.0))[1] == [QUIET_S, 5.0 * REST_FACTOR]


async def test_a_tenant_that_rests_or_takes_long_keeps_no_other_waiting() -> None:
    assert (await applied_for("one", "two", "three", took_s=5.0, num_applied=3))[0] == ["one", "two", "three"]
    assert (await applied_for("stuck", "two", "three", num_applied=2))[0] == ["two", "three"]


async def test_outcomes_that_wait_when_the_replica_ends_are_applied_at_once() -> None:
    store, noted = store_with(), Feedback.of_request("id", "Rhyme.", None, "key")
    store.given = {(tenant, "asked", noted.id): noted for tenant in ("one", "broken", "stuck", "two")}
    retriever = BrokenForOne()

    async def never(seconds: float) -> None:
        await asyncio.Event().wait()

    async with asked(store=store) as (_, served):
        services, options = served.services, {"applies": True, "sleep": never}
        learning = Learning(store, retriever, services.publisher, services.background, **options)
        for tenant in ("one", "broken", "two"):
            await learning.judge(tenant, ("id", None, 1.0), "key")
        async with finish_at_end(replace(services, learning=learning), FastAPI()):
            assert store.ranked == []
        assert [tenant for tenant, _ in store.ranked] == ["one", "two"]
        assert retriever.learning == ["one", "broken", "two"], "what cannot be applied is tried once"
        await learning.judge("stuck", ("id", None, 1.0), "key")
        await learning.finish(0.05)  # does not wait for ever
        services.background.cancel()


async def no_pause(seconds: float) -> None:
    await asyncio.sleep(0)


class Overtaken(FakeRetriever):
    """While it learns, another Ingress replica records a newer outcome and applies both."""

    def __init__(self, store: FakeStore) -> None:
        super().__init__()
        self.store, self.num_learnt = store, 0

    async def learn(self, tenant: str, outcomes: Sequence[Feedback]) -> Learnt:
        self.num_learnt += 1
        if self.num_learnt == 1:
            newer = Feedback.of_request("other", "Sing.", None, "key", 1.0)
            await self.store.put_feedback(tenant, "outcome", newer)
            both = await super().learn(tenant, await self.store.feedback(tenant, "outcome"))
            await self.store.rank(tenant, both.rankings, "key", are_outcomes=True)
        return await super().learn(tenant, outcomes)


async def test_an_outcome_of_another_replica_is_not_undone() -> None:
    store, noted = store_with(), Feedback.of_request("id", "Rhyme.", None, "key")
    store.given = {("local", "asked", noted.id): noted}
    retriever = Overtaken(store)
    async with asked(store=store) as (_, served):
        publisher, background = served.services.publisher, served.services.background
        learning = Learning(store, retriever, publisher, background, applies=True, sleep=no_pause)
        await learning.judge("local", ("id", None, 1.0), "key")
    assert [len(rankings) for _, rankings in store.ranked] == [2, 1, 2]
    assert retriever.num_learnt == 2, "it learns again only where outcomes changed"


class CheckingOneByOne(FakeRetriever):
    async def learn(self, tenant: str, outcomes: Sequence[Feedback]) -> Learnt:
        self.num_checked += 1
        found = await super().learn(tenant, outcomes[: self.num_checked])
        return replace(found, num_left=len(outcomes) - len(found.rankings))

    num_checked = 0


async def test_outcomes_that_are_left_to_be_checked_follow_by_themselves() -> None:
    store, noted = store_with(), Feedback.of_request("id", "Rhyme.", None, "key")
    store.given = {("local", "asked", noted.id): noted}
    async with asked(store=store) as (_, served):
        for number in range(2):
            await store.put_feedback("local", "outcome", Feedback.of_request(f"{number}", "Rhyme.", None, "key", 1.0))
        parts = store, CheckingOneByOne(), served.services.publisher, served.services.background
        await Learning(*parts, applies=True, sleep=no_pause).judge("local", ("id", None, 1.0), "key")
    assert [len(rankings) for _, rankings in store.ranked] == [1, 2, 3]


def test_outcomes_are_counted_by_adapter() -> None:
    said = [("acme/poet", 1.0), ("acme/poet", 0.5), ("acme/poet", -1.0), ("rival/coder", 0.0), (None, -0.25)]
    outcomes = [
        Feedback.of_request(f"{place}", "text", adapter, "key", score) for place, (adapter, score) in enumerate(said)
    ]
    assert counted("acme", outcomes) == {
        "poet": {"positive": 2, "negative": 1},
        "rival/coder": {"positive": 0, "negative": 0},
        "": {"positive": 0, "negative": 1},
    }
