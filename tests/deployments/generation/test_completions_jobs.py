from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from deployments.api.completions import ChatCompletionRequest, CompletionRequest
from deployments.api.responses import Planned
from deployments.generation.completions import derive_seed, make_jobs
from deployments.generation.row_stream import merge
from gpu_worker.front.request.request import Job
from gpu_worker.front.request.tools import Function, Tools
from lora_store import BASE_PLAN, Plan, PlannedAdapter
from tests.deployments.adapter_records import POOL

CODER = Planned(Plan("selection", (PlannedAdapter(POOL[1].ref, "w", 1.0),), template="chat"))


def jobs(request: ChatCompletionRequest | CompletionRequest, plans: list[Planned], count: int) -> list[Job]:
    templates = ["alpaca"] * len(plans)
    return make_jobs("r", "acme", request.sampling(), request.questions(), plans, templates, count)


def test_jobs_are_ordered_by_prompt_with_their_own_plans_and_names() -> None:
    request = CompletionRequest.model_validate({"prompt": ["a", "b"], "n": 2, "seed": 5, "max_tokens": 3})
    made = jobs(request, [Planned(BASE_PLAN), CODER], 2)
    assert [job.prompt for job in made] == ["a", "a", "b", "b"]
    assert [job.request_id for job in made] == ["r", "r-1", "r-2", "r-3"]
    assert [job.plan for job in made] == [BASE_PLAN, BASE_PLAN, CODER.plan, CODER.plan]
    assert [job.template for job in made] == ["alpaca", "alpaca", "chat", "chat"]
    assert [job.sampling.seed for job in made] == [5, derive_seed(5, 1), 5, derive_seed(5, 1)]
    assert {(job.tenant, job.sampling.max_tokens) for job in made} == {("acme", 3)}
    unseeded = CompletionRequest.model_validate({"prompt": "a", "n": 3})
    assert [job.sampling.seed for job in jobs(unseeded, [Planned(BASE_PLAN)], 3)] == [None] * 3, "each has its own"


@pytest.mark.parametrize("has_tools", [False, True])
def test_every_choice_of_a_chat_gets_its_tools(has_tools: bool) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}] if has_tools else None
    body = {"messages": [{"role": "user", "content": "a"}], "n": 2, "tools": tools}
    made = jobs(ChatCompletionRequest.model_validate(body), [Planned(BASE_PLAN)], 2)
    assert [job.tools for job in made] == [Tools((Function("f"),)) if has_tools else None] * 2


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_choices_have_different_seeds_and_the_first_has_the_clients(seed: int) -> None:
    seeds = [derive_seed(seed, choice) for choice in range(16)]
    assert seeds[0] == seed
    assert len(set(seeds)) == 16
    assert all(0 <= one < 2**63 for one in seeds)


class Stream:
    """Yields items as permitted, and records whether it was closed."""

    def __init__(self, items: Sequence[object]) -> None:
        self.items, self.is_closed = items, False
        self.gate = asyncio.Event()

    async def run(self) -> AsyncGenerator[Any]:
        try:
            for item in self.items:
                await self.gate.wait()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.is_closed = True


@pytest.mark.parametrize("counts", [[3], [2, 0, 3], [0, 0], [1, 1, 1, 1]])
async def test_every_item_arrives_once_in_the_order_of_its_stream(counts: list[int]) -> None:
    streams = [Stream([(place, number) for number in range(count)]) for place, count in enumerate(counts)]
    for stream in streams:
        stream.gate.set()
    seen: list[list[object]] = [[] for _ in streams]
    async for place, item in merge([stream.run() for stream in streams]):
        seen[place].append((place, item))
    assert seen == [list(stream.items) for stream in streams]
    assert all(stream.is_closed for stream in streams)


async def test_a_slow_stream_does_not_delay_others() -> None:
    slow, fast = Stream(["s"]), Stream(["f1", "f2"])
    fast.gate.set()
    async with aclosing(merge([slow.run(), fast.run()])) as items:
        assert [await anext(items) for _ in range(2)] == ["f1", "f2"]
        slow.gate.set()
        assert await anext(items) == "s"


async def test_an_error_of_one_stream_ends_all() -> None:
    waiting, broken = Stream(["never"]), Stream([ValueError("broken")])
    broken.gate.set()
    with pytest.raises(ValueError, match="broken"):
        async for _ in merge([waiting.run(), broken.run()]):
            raise AssertionError
    assert waiting.is_closed


@pytest.mark.parametrize("way", ["close", "cancel"])
async def test_leaving_closes_every_stream(way: str) -> None:
    streams = [Stream(["a", "b"]), Stream(["c"]), Stream(["d"])]
    streams[0].gate.set()
    streams[1].gate.set()

    async def consume() -> None:
        async with aclosing(merge([stream.run() for stream in streams])) as items:
            await anext(items)
            if way == "cancel":
                task.cancel()
                await asyncio.sleep(0)

    task = asyncio.create_task(consume())
    await asyncio.wait([task])
    assert task.cancelled() == (way == "cancel")
    assert [stream.is_closed for stream in streams] == [True, True, True]
