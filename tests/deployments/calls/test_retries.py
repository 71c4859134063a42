"""Which calls are made again, how often, and what their callers are told in the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments.calls.retries import retry_on_replica_death, retry_stream
from deployments.errors import PoisonRequest
from gpu_worker.errors import EngineStopped, PromptTooLong, RequestFailed
from lora_store import AdapterNotFound
from tests.fakes import FakeHandle, as_ray_raises

DEATHS = [ActorDiedError(), ActorUnavailableError("gone", None), ObjectLostError("0" * 56, None, "")]
FAILURES = [*DEATHS, EngineStopped("the engine has stopped")]
ANSWERS = [
    PromptTooLong("long"),
    RequestFailed("r-1"),
    AdapterNotFound("x"),
    BackPressureError(2, 1),
    DeploymentUnavailableError(DeploymentID("Worker", "app")),
    TimeoutError(),
    as_ray_raises(RuntimeError("a replica's own")),
    RayTaskError("read", "Traceback", ActorDiedError(), "replica", 1, "127.0.0.1").as_instanceof_cause(),
]


@dataclass
class Scripted:
    """Answers `script` in turn: an exception is raised, a tuple is streamed up to the exception in it."""

    script: Sequence[Any]
    asked: list[tuple[Any, ...]] = field(default_factory=list)

    async def read(self, *args: Any) -> Any:
        self.asked.append(args)
        answer = self.script[len(self.asked) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def stream(self, *args: Any) -> AsyncIterator[Any]:
        self.asked.append(args)
        for item in self.script[len(self.asked) - 1]:
            if isinstance(item, Exception):
                raise item
            yield item


def ask(*script: Any) -> tuple[Any, Scripted]:
    """What comes of it, an exception or the answer."""
    target = Scripted(script)

    async def run() -> Any:
        try:
            return await retry_on_replica_death(FakeHandle(target).read, "a", 1)
        except Exception as exc:
            return exc

    return asyncio.run(run()), target


def stream(*script: tuple[Any, ...], whole: bool) -> tuple[list[Any], Scripted]:
    """What comes of it, the exception that ends it included."""
    target = Scripted(script)
    handle = FakeHandle(target)

    async def begin() -> AsyncGenerator[Any]:
        async for item in handle.options(stream=True).stream.remote("job"):
            yield item

    async def run() -> list[Any]:
        got: list[Any] = []
        try:
            async for item in retry_stream(begin, whole=whole):
                got.append(item)
        except Exception as exc:
            got.append(exc)
        return got

    return asyncio.run(run()), target


def name(value: object) -> str:
    return type(value).__name__


@pytest.mark.parametrize("failure", FAILURES, ids=name)
@pytest.mark.parametrize("num_failures", [1, 2])
def test_a_call_whose_replica_fails_is_made_again_with_the_same_arguments(
    failure: Exception, num_failures: int
) -> None:
    found, target = ask(*[failure] * num_failures, "answer")
    assert found == "answer"
    assert target.asked == [("a", 1)] * (num_failures + 1)


@pytest.mark.parametrize("failure", DEATHS, ids=name)
def test_the_third_death_is_the_last(failure: Exception) -> None:
    found, target = ask(*[failure] * 3, "never")
    assert isinstance(found, PoisonRequest) and "3 replicas" in str(found) and found.__cause__ is failure
    assert len(target.asked) == 3


def test_an_engine_that_fails_for_the_third_time_says_so_itself() -> None:
    found, target = ask(ActorDiedError(), *[EngineStopped("the engine has stopped")] * 2)
    assert isinstance(found, EngineStopped)
    assert len(target.asked) == 3


@pytest.mark.parametrize("answer", ANSWERS, ids=str)
def test_what_is_no_death_is_the_answer(answer: Exception) -> None:
    found, target = ask(answer, "never")
    assert type(found).__name__ in {type(answer).__name__, f"RayTaskError({type(answer).__name__})"}
    assert len(target.asked) == 1
    got, target = stream((answer,), ("never",), whole=True)
    assert len(got) == len(target.asked) == 1


@pytest.mark.parametrize("failure", FAILURES, ids=name)
@pytest.mark.parametrize("whole", [False, True])
def test_a_stream_that_has_not_begun_is_begun_again(failure: Exception, whole: bool) -> None:
    got, target = stream((failure,), (failure,), ("a", "b"), whole=whole)
    assert got == ["a", "b"]
    assert target.asked == [("job",)] * 3


@pytest.mark.parametrize("failure", FAILURES, ids=name)
def test_what_has_left_is_never_said_again(failure: Exception) -> None:
    [first, error], target = stream(("a", failure), ("never",), whole=False)
    assert first == "a" and isinstance(error, type(failure))
    assert len(target.asked) == 1


def test_a_whole_answer_has_nothing_of_the_attempts_that_died() -> None:
    got, target = stream(("a", DEATHS[0]), ("a", "x", DEATHS[1]), ("a", "b", "c"), whole=True)
    assert got == ["a", "b", "c"]
    assert len(target.asked) == 3


@pytest.mark.parametrize("whole", [False, True])
def test_a_job_is_given_to_three_replicas_at_most(whole: bool) -> None:
    got, target = stream(*[(DEATHS[0],)] * 3, ("never",), whole=whole)
    assert [type(item) for item in got] == [PoisonRequest]
    assert len(target.asked) == 3


def test_leaving_closes_the_attempt_that_is_under_way() -> None:
    closed = []

    async def begin() -> AsyncGenerator[str]:
        try:
            yield "a"
            yield "b"
        finally:
            closed.append(True)

    async def run() -> None:
        items = retry_stream(begin, whole=False)
        assert await anext(items) == "a"
        assert not closed
        await items.aclose()
        assert closed

    asyncio.run(run())
