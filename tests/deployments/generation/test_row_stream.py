"""When a row's job is sent again, and what counts as the death of its Worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from deployments.auth.authenticator import TokenUsage
from deployments.calls.worker_client import BaseWorkers, Workers, serve_worker
from deployments.errors import PoisonRequest, WorkerStarting
from deployments.generation.row_stream import NO_ROOM, RowStream
from deployments.observability.request_context import RequestContext
from gpu_worker.errors import DeadlineExceeded, EngineFull, PromptTooLong
from gpu_worker.front.request.request import Delta, Job, TokenLogprob
from gpu_worker.front.request.tools import Function, Tools
from tests.fakes import ANSWERS, DEATHS, FAILURES, FakeHandle
from tests.virtual_time import run_in_virtual_time

A, B, C = Delta("a", 4, 1), Delta("b", 4, 2), Delta("c", 4, 3, "stop")
FOREVER = object()


@dataclass
class Scripted:
    """A Worker that streams one part of the script per job. Exceptions are raised; FOREVER waits."""

    script: Sequence[Sequence[Any]]
    jobs: list[Job] = field(default_factory=list)

    async def stream(self, job: Job) -> AsyncIterator[Delta | None]:
        self.jobs.append(job)
        for item in self.script[len(self.jobs) - 1]:
            if item is FOREVER:
                await asyncio.Event().wait()
            if isinstance(item, BaseException):
                raise item
            yield item


@dataclass
class Case:
    """A row over a scripted Worker."""

    worker: Scripted
    handle: FakeHandle
    row: RowStream
    usage: TokenUsage
    counts: list[tuple[int, int]] = field(default_factory=list)

    async def taken(self) -> list[Any]:
        """Return what the stream yields, and the exception that ends it."""
        got: list[Any] = []
        try:
            async with aclosing(self.row.deltas()) as deltas:
                async for index, delta in deltas:
                    assert index == 3
                    got.append(delta)
        except Exception as exc:
            got.append(exc)
        return got

    async def collected(self) -> list[Any]:
        """Return all deltas, or the exception."""
        try:
            return list(await self.row.collect(lambda *counted: self.counts.append(counted)))
        except Exception as exc:
            return [exc]


def case_of(
    *script: Sequence[Any],
    silence_s: float = 30.0,
    time_s: float = 60.0,
    grace_s: float = 5.0,
    workers: BaseWorkers | None = None,
) -> Case:
    worker, usage = Scripted(script), TokenUsage()
    handle, context = FakeHandle(worker), RequestContext("r", "none")
    client = serve_worker(handle, heartbeat_timeout_s=silence_s)
    row = RowStream(
        Workers({"": workers or BaseWorkers(client, None)}),
        Job("r-3", "x" * 12),
        index=3,
        question=1,
        usage=usage,
        context=context,
        deadline=time.monotonic() + time_s,
        grace_s=grace_s,
    )
    return Case(worker, handle, row, usage)


Way = Callable[[Case], Coroutine[Any, Any, list[Any]]]
WAYS: list[Way] = [Case.taken, Case.collected]


def run(way: Way, case: Case) -> list[Any]:
    return run_in_virtual_time(way(case))


def name(value: object) -> str:
    return getattr(value, "__name__", type(value).__name__)


@pytest.mark.parametrize("failure", FAILURES, ids=name)
@pytest.mark.parametrize("way", WAYS, ids=name)
def test_a_job_whose_worker_died_before_its_first_delta_is_sent_again(failure: Exception, way: Way) -> None:
    case = case_of((failure,), (None, failure), (A, B))
    assert run(way, case) == [A, B]
    assert len(case.worker.jobs) == 3
    assert [response.num_cancels for response in case.handle.responses] == [1, 1, 0], "the last one has ended"
    assert case.usage.num_tokens == 4 + 2, "charged once"


@pytest.mark.parametrize("failure", FAILURES, ids=name)
def test_a_yielded_delta_is_never_repeated(failure: Exception) -> None:
    case = case_of((A, failure), ("never",))
    [first, error] = run(Case.taken, case)
    assert first == A and isinstance(error, type(failure))
    assert len(case.worker.jobs) == 1


def test_a_whole_answer_contains_nothing_of_failed_attempts() -> None:
    case = case_of((A, DEATHS[0]), (A, B, DEATHS[1]), (A, B, C))
    assert run(Case.collected, case) == [A, B, C]
    assert case.usage.num_tokens == 4 + 3
    assert case.row.context.num_tokens[2] == 3


def test_log_probabilities_of_failed_attempts_are_not_counted() -> None:
    scored = replace(A, logprobs=(TokenLogprob(b"a", -1.0, ((b"b", -2.0),), 0),) * 3)
    case = case_of((scored, DEATHS[0]), (scored, C))
    assert run(Case.collected, case) == [scored, C]
    assert case.counts == [(3, 6), (3, 6), (3, 6)]


@pytest.mark.parametrize("way", WAYS, ids=name)
def test_a_job_is_sent_to_three_workers_at_most(way: Way) -> None:
    case = case_of(*[(DEATHS[0],)] * 3, ("never",))
    assert [type(item) for item in run(way, case)] == [PoisonRequest]
    assert len(case.worker.jobs) == 3


@pytest.mark.parametrize("answer", ANSWERS, ids=name)
@pytest.mark.parametrize("way", WAYS, ids=name)
def test_an_error_that_is_not_a_death_ends_the_row(answer: Exception, way: Way) -> None:
    case = case_of((answer,), ("never",))
    [found] = run(way, case)
    assert type(found).__name__ in {type(answer).__name__, f"RayTaskError({type(answer).__name__})"}
    assert len(case.worker.jobs) == 1


@pytest.mark.parametrize("error", [PromptTooLong("long"), EngineFull("full")], ids=name)
def test_a_prompt_is_charged_with_its_tools_unless_the_server_had_no_room(error: Exception) -> None:
    tools = Tools((Function("weather", "Tell it.", "{}"),))
    for given, num_tokens in ((None, 12 // 4), (tools, 12 // 4 + 5)):
        case = case_of((error,))
        run(Case.collected, replace(case, row=replace(case.row, job=replace(case.row.job, tools=given))))
        assert case.usage.num_tokens == (0 if isinstance(error, NO_ROOM) else num_tokens)


@pytest.mark.parametrize("way", WAYS, ids=name)
def test_heartbeats_are_no_part_of_an_answer(way: Way) -> None:
    assert run(way, case_of((None, A, None, None, B, None))) == [A, B]


@pytest.mark.parametrize("said", [(), (A,), (None,)])
@pytest.mark.parametrize("way", WAYS, ids=name)
def test_a_worker_that_hangs_past_deadline_and_grace_is_abandoned(said: tuple[Any, ...], way: Way) -> None:
    case = case_of((*said, FOREVER), time_s=0.02, grace_s=0.02)
    *_, last = run(way, case)
    assert isinstance(last, DeadlineExceeded)
    # On a slow machine the time may be over before the call.
    assert [response.num_cancels for response in case.handle.responses] in ([1], [])


class ClosedWorkers(BaseWorkers):
    """No worker starts in time."""

    def __init__(self) -> None:
        pass

    async def ready(self) -> None:
        raise WorkerStarting(1.0)


@pytest.mark.parametrize("way", WAYS, ids=name)
def test_without_a_worker_nothing_is_sent_or_charged(way: Way) -> None:
    case = case_of((A, B), workers=ClosedWorkers())
    [error] = run(way, case)
    assert isinstance(error, WorkerStarting)
    assert (case.worker.jobs, case.usage.num_tokens) == ([], 0)


async def test_leaving_cancels_the_job_at_once_and_its_tokens_are_charged() -> None:
    case = case_of((A, B, FOREVER))
    deltas = case.row.deltas()
    assert [await anext(deltas) for _ in range(2)] == [(3, A), (3, B)]
    assert case.handle.responses[0].num_cancels == 0
    await deltas.aclose()
    assert (case.handle.responses[0].num_cancels, case.usage.num_tokens) == (1, 4 + 2)
