"""Reads of the Retriever are repeated with the same arguments if their replica dies; streams are not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.exceptions import RayActorError

from deployments.calls.catalogue_clients import RetrieverClient, serve_retriever
from retriever_svc import PageRequest, ReindexStep, RouteRequest
from tests.deployments.fake_retriever import FakeRetriever
from tests.fakes import FakeHandle

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


@dataclass
class Mortal:
    """Dies in the first call of any method, then answers "answer"."""

    asked: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[str]]:
        async def method(*args: Any) -> str:
            self.asked.append((name, args))
            if len(self.asked) == 1:
                raise RayActorError()
            return "answer"

        return method


@pytest.mark.parametrize("method", READS)
def test_a_read_is_repeated_with_the_same_arguments(method: str) -> None:
    replica, (read, args) = Mortal(), READS[method]

    async def main() -> Any:
        return await read(serve_retriever(FakeHandle(replica)))

    assert asyncio.run(main()) == "answer"
    assert replica.asked == [(method, args)] * 2


def test_leaving_a_stream_cancels_the_work() -> None:
    steps = [ReindexStep(number, 3, {}) for number in range(1, 4)]
    handle = FakeHandle(FakeRetriever(steps=[list(steps)]))

    async def main() -> ReindexStep:
        async with aclosing(serve_retriever(handle).reindex("model")) as items:
            return await anext(items)

    assert asyncio.run(main()) == steps[0]
    assert [response.num_cancels for response in handle.responses] == [1]
