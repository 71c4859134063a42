"""From a request and its plans to the rows of the engine that answer it, and their answers together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from deployments.api.completions import GenerationRequest, Question
from deployments.api.planned import Planned
from gpu_worker.request.request import Job

T = TypeVar("T")
_SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that no two choices share a seed
_SEEDS = 2**63


def jobs_of(
    request_id: str, request: GenerationRequest, questions: Sequence[Question], plans: Sequence[Planned], template: str
) -> list[Job]:
    """One job a choice: `n` to each prompt, in order. `template` is the one where a plan names none.

    Raises: SamplingInvalid.
    """
    sampling = request.sampling()
    jobs: list[Job] = []
    for question, planned in zip(questions, plans, strict=True):
        for choice in range(request.n):
            own = sampling if sampling.seed is None else replace(sampling, seed=seed_of(sampling.seed, choice))
            name = request_id if not jobs else f"{request_id}-{len(jobs)}"
            jobs.append(Job(name, question.prompt, planned.plan, own, planned.plan.template or template))
    return jobs


def seed_of(seed: int, choice: int) -> int:
    """The seed of a prompt's `choice`: the first has the client's own, as if it had been asked for alone."""
    return (seed + choice * _SEED_STEP) % _SEEDS


async def interleaved(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """(place of the stream, item) as items come. An error of one stream ends all; leaving closes all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    waiting = {_next_of(stream): place for place, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                place = waiting.pop(task)
                for item in task.result():
                    yield place, item
                    waiting[_next_of(streams[place])] = place
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.gather(*[stream.aclose() for stream in streams], return_exceptions=True)


def _next_of(stream: AsyncGenerator[T]) -> asyncio.Task[tuple[T, ...]]:
    """The stream's next item, or nothing at its end."""

    async def step() -> tuple[T, ...]:
        try:
            return (await anext(stream),)
        except StopAsyncIteration:
            return ()

    return asyncio.create_task(step())
