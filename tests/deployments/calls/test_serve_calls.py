"""Calls between replicas: which are repeated and how often, and their transport."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from ray.exceptions import ActorDiedError

from deployments.calls.serve_calls import bypass_http_proxy, retry_on_replica_death
from deployments.cli.client import free_port
from deployments.errors import PoisonRequest
from gpu_worker.errors import EngineStopped
from tests.fakes import ANSWERS, DEATHS, FAILURES, FakeHandle


@dataclass
class Scripted:
    """Answers with `script` in turn; exceptions are raised."""

    script: Sequence[Any]
    asked: list[tuple[Any, ...]] = field(default_factory=list)

    async def read(self, *args: Any) -> Any:
        self.asked.append(args)
        answer = self.script[len(self.asked) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer


async def ask(*script: Any) -> tuple[Any, Scripted]:
    """Return the answer or the exception."""
    target = Scripted(script)
    try:
        handle = FakeHandle(target)
        return await retry_on_replica_death(lambda: handle.read.remote("a", 1)), target
    except Exception as exc:
        return exc, target


def name(value: object) -> str:
    return type(value).__name__


@pytest.mark.parametrize("failure", FAILURES, ids=name)
@pytest.mark.parametrize("num_failures", [1, 2])
async def test_a_call_whose_replica_fails_is_made_again_with_the_same_arguments(
    failure: Exception, num_failures: int
) -> None:
    found, target = await ask(*[failure] * num_failures, "answer")
    assert found == "answer"
    assert target.asked == [("a", 1)] * (num_failures + 1)


@pytest.mark.parametrize("failure", DEATHS, ids=name)
async def test_the_third_death_is_the_last(failure: Exception) -> None:
    found, target = await ask(*[failure] * 3, "never")
    assert isinstance(found, PoisonRequest) and "3 replicas" in str(found) and found.__cause__ is failure
    assert len(target.asked) == 3


async def test_the_third_failure_of_an_engine_is_its_own_error() -> None:
    found, target = await ask(ActorDiedError(), *[EngineStopped("the engine has stopped")] * 2)
    assert isinstance(found, EngineStopped)
    assert len(target.asked) == 3


@pytest.mark.parametrize("answer", ANSWERS, ids=str)
async def test_other_errors_are_the_answer(answer: Exception) -> None:
    found, target = await ask(answer, "never")
    assert type(found).__name__ in {type(answer).__name__, f"RayTaskError({type(answer).__name__})"}
    assert len(target.asked) == 1


async def is_reached(within_s: float) -> bool:
    """Return whether a new channel reaches a gRPC server of this process."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await asyncio.wait_for(channel.channel_ready(), within_s)
    except TimeoutError:
        return False
    finally:
        await server.stop(None)
    return True


async def test_calls_to_replicas_bypass_an_http_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The port of `http_proxy` has no listener. The variable that is set is restored after the test."""
    for name in ("https_proxy", "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port('127.0.0.1')}")
    own = "grpc_proxy"
    monkeypatch.setenv(own, "http://gate:3128")
    bypass_http_proxy()
    assert os.environ[own] == "http://gate:3128", "an explicit one is kept"
    monkeypatch.delenv(own)
    assert not await is_reached(0.5), "gRPC ignores the proxy anyway: bypass_http_proxy is not needed"
    bypass_http_proxy()
    assert await is_reached(20)
