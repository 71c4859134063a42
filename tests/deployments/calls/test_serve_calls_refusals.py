"""Answers to wrong requests: a replica returns them, because Serve logs what it raises, and the caller raises them."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

import pytest

from deployments.app import application
from deployments.calls.catalogue_clients import RetrieverReplica, StoreReplica
from deployments.calls.serve_calls import ServeCalls, returning_refusals
from deployments.calls.worker_client import WorkerReplica, serve_worker
from deployments.errors import EncoderBusy
from gpu_worker.errors import AdapterLoadFailed, EngineFull, EngineStopped, GrammarInvalid
from gpu_worker.front.request.request import Job
from lora_store import BASE_PLAN, AdapterNotFound, StoreUnavailable
from retriever_svc import PlanGone, StaleIndex
from tests.deployments.app_fakes import config_of
from tests.deployments.fake_worker import DELTAS, FakeWorker
from tests.fakes import FakeHandle

REFUSALS = [
    AdapterNotFound("mispelt"),
    PlanGone("local/a", "0123"),
    GrammarInvalid("no", "/properties/a", "response_format"),
    EncoderBusy(7, has_read=True),
    EngineFull("full"),
    StaleIndex(8, 7),
]
FAILURES = [StoreUnavailable("gone"), AdapterLoadFailed("lost"), EngineStopped("ended"), RuntimeError("a defect")]


class Reads(Protocol):
    """The calls of this test."""

    async def read(self, key: str) -> str: ...
    def lines(self, key: str) -> AsyncIterator[str]: ...


@dataclass
class Replica:
    """Answers `good`, and raises `error` for any other key."""

    error: Exception

    async def read(self, key: str) -> str:
        if key != "good":
            raise self.error
        return "text"

    async def lines(self, key: str) -> AsyncIterator[str]:
        yield "first"
        yield await self.read(key)

    async def check_health(self) -> None:
        raise self.error


def made(error: Exception) -> Any:
    return returning_refusals(Replica, Reads)(error)


async def gathered(stream: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in stream]


@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
async def test_a_refusal_is_returned_by_the_replica_and_raised_by_the_caller(error: Exception) -> None:
    replica = made(error)
    assert await replica.read("bad") is error
    assert await gathered(replica.lines("bad")) == ["first", error]
    calls: ServeCalls[Reads] = ServeCalls(FakeHandle(replica))  # type: ignore[arg-type]
    for call in (calls.once, calls.retry):
        with pytest.raises(type(error)) as raised:
            await call(Reads.read, "bad")
        assert raised.value is error
    seen = []
    with pytest.raises(type(error)):
        async for item in calls.stream(Reads.lines, "bad"):
            seen.append(item)
    assert seen == ["first"]
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
async def test_a_failure_of_the_server_is_raised_by_the_replica(error: Exception) -> None:
    replica = made(error)
    with pytest.raises(type(error)):
        await replica.read("bad")
    with pytest.raises(type(error)):
        await gathered(replica.lines("bad"))


async def test_other_answers_and_methods_stay_as_they_are() -> None:
    replica = made(AdapterNotFound("x"))
    assert await replica.read("good") == "text"
    assert await gathered(replica.lines("good")) == ["first", "text"]
    with pytest.raises(AdapterNotFound):
        await replica.check_health()  # Serve calls it, and reads an exception as ill health


async def test_a_refused_job_ends_its_stream_with_its_error() -> None:
    refused = GrammarInvalid("no", "/properties/a", "response_format")
    worker = returning_refusals(FakeWorker, WorkerReplica)(events=(DELTAS[0], refused))
    stream = serve_worker(FakeHandle(worker)).stream(Job("r", "hi", BASE_PLAN))  # type: ignore[arg-type]
    deadline = asyncio.get_running_loop().time() + 60
    assert await stream.next(deadline) == DELTAS[0]
    with pytest.raises(GrammarInvalid) as raised:
        await stream.next(deadline)
    assert raised.value is refused


def test_every_deployment_of_the_application_returns_refusals() -> None:
    ingress = application(config_of())._bound_deployment
    calls = {"Store": StoreReplica, "Worker": WorkerReplica, "Retriever": RetrieverReplica}
    given = ingress.init_kwargs
    bound = [each._bound_deployment for each in (given["retriever"], given["store"], *given["workers"].values())]
    assert {each.name for each in bound} == calls.keys()
    for each in bound:
        names = [name for name in dir(calls[each.name]) if not name.startswith("_")]
        assert len(names) >= 8
        for name in names:
            assert hasattr(getattr(each.func_or_class, name), "__wrapped__"), f"{each.name}.{name}"
