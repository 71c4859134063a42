"""Calls of the Store: which are repeated, their transports, and how long a change waits for a replica.

Reads of the Retriever are repeated with the same arguments if their replica dies; streams are not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from deployments.api.adapters import PublishItem
from deployments.calls.catalogue_clients import RetrieverClient, StoreClient, serve_retriever, serve_store
from deployments.errors import PoisonRequest
from lora_store import Edit, StoreUnavailable
from retriever_svc import PageRequest, ReindexStep, RouteRequest
from tests.deployments.adapter_records import adapter, digest_of
from tests.deployments.fake_retriever import FakeRetriever
from tests.fakes import FakeHandle
from tests.virtual_time import in_virtual_time

Ask = Callable[[StoreClient], Awaitable[Any]]
REF = adapter("poet").ref
REPEATED: dict[str, Ask] = {
    "ping": lambda store: store.check_available(),
    "active_encoder": lambda store: store.active_encoder(),
    "versions": lambda store: store.versions([("local", "poet")]),
    "stage": lambda store: store.stage(PublishItem(Path("poet")), {}),
    "restage": lambda store: store.restage(adapter("poet")),
    "edit": lambda store: store.edit(adapter("poet"), Edit()),
    "commit": lambda store: store.commit([], [], [], "tester", commit_id="1"),
    "withdraw": lambda store: store.withdraw("local", ["poet"], "tester", commit_id="1"),
}
SENT_ONCE: dict[str, Ask] = {
    "commit": lambda store: store.commit([], [], [], "tester"),
    "withdraw": lambda store: store.withdraw("local", ["poet"], "tester"),
    "discard": lambda store: store.discard([]),
    "set_visibility": lambda store: store.set_visibility("local", "poet", "private", "tester"),
    "approve": lambda store: store.approve([REF], "tester"),
    "set_name": lambda store: store.set_name(("local", "poet"), "", "tester"),
    "approve_name": lambda store: store.approve_name(REF),
    "add_embeddings": lambda store: store.add_embeddings({}),
    "rank": lambda store: store.rank("local", [], "tester"),
    "activate_encoder": lambda store: store.activate_encoder("model", "identity", "tester"),
    "unreferenced": lambda store: store.unreferenced([]),
    "sweep": lambda store: store.sweep([]),
    "gc": lambda store: store.gc(0.0),
    "fetch": lambda store: store.fetch(digest_of("poet")),
}


@dataclass
class Dying:
    """A deployment whose replicas die in the first `num_deaths` calls; the others get "answer"."""

    num_deaths: int
    asked: list[tuple[Any, ...]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[str]]:
        async def method(*args: Any) -> str:
            self.asked.append((name, *args))
            if len(self.asked) <= self.num_deaths:
                raise RayActorError()
            return "answer"

        return method


@pytest.mark.parametrize("method", REPEATED)
async def test_a_call_that_is_safe_to_repeat_survives_two_deaths(method: str) -> None:
    store = Dying(num_deaths=2)
    await REPEATED[method](serve_store(FakeHandle(store)))
    assert [name for name, *_ in store.asked] == [method] * 3
    with pytest.raises(PoisonRequest):
        await REPEATED[method](serve_store(FakeHandle(Dying(num_deaths=3))))


@pytest.mark.parametrize("method", SENT_ONCE)
async def test_any_other_call_is_sent_once(method: str) -> None:
    store = Dying(num_deaths=1)
    with pytest.raises(RayActorError):
        await SENT_ONCE[method](serve_store(FakeHandle(store)))
    assert [name for name, *_ in store.asked] == [method]


@pytest.mark.parametrize("method", [*REPEATED, *SENT_ONCE])
async def test_large_files_and_references_go_over_the_object_store(method: str) -> None:
    handle = FakeHandle(Dying(num_deaths=3))
    with pytest.raises((RayActorError, PoisonRequest)):
        await {**SENT_ONCE, **REPEATED}[method](serve_store(handle))
    assert {call.by_reference for call in handle.calls} == {True if method in ("stage", "edit", "fetch") else None}


@pytest.mark.parametrize("method", ["ping", "active_encoder", "versions"])
@in_virtual_time
async def test_the_first_call_of_a_change_waits_a_minute_for_a_replica(method: str) -> None:
    class Absent:
        def __getattr__(self, name: str) -> Callable[..., Awaitable[bool]]:
            return lambda *_: asyncio.Event().wait()

    loop = asyncio.get_running_loop()
    with pytest.raises(StoreUnavailable, match="no replica answered within 60 s"):
        await REPEATED[method](serve_store(FakeHandle(Absent())))
    assert loop.time() == 60.0


REQUEST, PAGE = RouteRequest("Rhyme"), PageRequest(10)
READS: dict[str, tuple[Callable[[RetrieverClient], Awaitable[Any]], tuple[Any, ...]]] = {
    "route": (lambda client: client.route([REQUEST]), ([REQUEST],)),
    "plan_named": (
        lambda client: client.plan_named("t", [("poet", 1.0)], "selection", 7),
        ("t", [("poet", 1.0)], "selection", 7),
    ),
    "replay": (lambda client: client.replay("t", "mixture", [], 7), ("t", "mixture", [], 7)),
    "policies": (lambda client: client.policies("t", "support", 7, 1), ("t", "support", 7, 1)),
    "names": (lambda client: client.names("t", 7), ("t", 7, "", None, False)),
    "page": (lambda client: client.page("t", PAGE, 7), ("t", PAGE, 7)),
    "map": (lambda client: client.map("t", 7), ("t", 7)),
    "place": (lambda client: client.place("t", "text", ["poet"], 7), ("t", "text", ["poet"], 7)),
    "load": (lambda client: client.load("t"), ("t",)),
    "record": (lambda client: client.record("t", "poet", 7), ("t", "poet", 7)),
    "samples": (lambda client: client.samples("t", "poet", 7), ("t", "poet", 7)),
    "embed": (lambda client: client.embed([()], ["t"]), ([()], ["t"])),
}


@pytest.mark.parametrize("method", READS)
async def test_a_read_is_repeated_with_the_same_arguments(method: str) -> None:
    replica, (read, args) = Dying(num_deaths=1), READS[method]
    assert await read(serve_retriever(FakeHandle(replica))) == "answer"
    assert replica.asked == [(method, *args)] * 2


async def test_leaving_a_stream_cancels_the_work() -> None:
    steps = [ReindexStep(number, 3, {}) for number in range(1, 4)]
    handle = FakeHandle(FakeRetriever(steps=[list(steps)]))
    async with aclosing(serve_retriever(handle).reindex("model")) as items:
        assert await anext(items) == steps[0]
    assert [response.num_cancels for response in handle.responses] == [1]
