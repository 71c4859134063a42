"""Calls of the Store and the Retriever: which are repeated, and their streams."""

from __future__ import annotations

import inspect
from contextlib import aclosing, suppress

from ray.exceptions import RayActorError

from deployments.calls.catalogue_clients import RetrieverClient, StoreClient, serve_retriever, serve_store
from deployments.errors import PoisonRequest
from retriever_svc import ReindexStep
from tests.deployments.calls.dying import Dying
from tests.deployments.fake_retriever import FakeRetriever
from tests.fakes import FakeHandle

WITH_AN_ID = {"commit", "withdraw", "expire"}  # repeated if they have one
SENT_ONCE = {
    *("delete_parts", "discard", "set_visibility", "approve", "set_name", "approve_name", "add_embeddings", "rank"),
    *("activate_encoder", "unreferenced", "sweep", "gc", "fetch"),
}


def count_calls(client: type) -> dict[str, int]:
    """Return the calls of any one replica, with the numbers of arguments that they need."""
    found = {}
    for name, method in inspect.getmembers(client, inspect.isfunction):
        if inspect.iscoroutinefunction(inspect.unwrap(method)) and not name.startswith(("_", "broadcast")):
            parameters = list(inspect.signature(method).parameters.values())[1:]
            found[name] = sum(parameter.default is parameter.empty for parameter in parameters)
    return found


STORE, RETRIEVER = count_calls(StoreClient), count_calls(RetrieverClient)


async def num_sent(client: object, name: str, count: int, replica: Dying, **named: str) -> int:
    """Return how often the call was sent. Check that it was always sent under its name with the same arguments."""
    given = tuple(range(count))
    with suppress(RayActorError, PoisonRequest):
        await getattr(client, name)(*given, **named)
    [sent] = set(replica.received)
    assert sent[: count + 1] == (name, *given)
    return len(replica.received)


async def test_calls_that_are_safe_to_repeat_are_repeated_and_the_others_sent_once() -> None:
    for name, count in STORE.items():
        handle = FakeHandle(replica := Dying(num_deaths=3))
        sent = await num_sent(serve_store(handle), name, count, replica)
        assert sent == (1 if name in SENT_ONCE | WITH_AN_ID else 3), name
    for name in WITH_AN_ID:
        store = serve_store(FakeHandle(replica := Dying(num_deaths=2)))
        assert await num_sent(store, name, STORE[name], replica, commit_id="1") == 3
    for name, count in RETRIEVER.items():
        retriever = serve_retriever(FakeHandle(replica := Dying(num_deaths=3)))
        assert await num_sent(retriever, name, count, replica) == (1 if name == "refit" else 3), name
    assert len(STORE) > 25 and len(RETRIEVER) > 15


async def test_leaving_a_stream_cancels_the_work() -> None:
    steps = [ReindexStep(number, 3, {}) for number in range(1, 4)]
    handle = FakeHandle(FakeRetriever(steps=[list(steps)]))
    async with aclosing(serve_retriever(handle).reindex("model")) as items:
        assert await anext(items) == steps[0]
    assert [response.num_cancels for response in handle.responses] == [1]
