"""Make the jobs of a request, and merge the streams of their answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
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
    """Return one job per choice: `n` for each prompt, in order. `template` applies where a plan names none.

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
    """Return the seed of a prompt's `choice`. The first gets the client's own, as if it had been requested alone."""
    return (seed + choice * _SEED_STEP) % _SEEDS


def merge(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    """Return one stream of the items of all, as they arrive. An error of one stream ends all; leaving closes all."""
    return streams[0] if len(streams) == 1 else _merged(streams)


async def _merged(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    waiting = {_next_of(stream): place for place, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                place = waiting.pop(task)
                for item in task.result():
                    yield item
                    waiting[_next_of(streams[place])] = place
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.gather(*[stream.aclose() for stream in streams], return_exceptions=True)


def _next_of(stream: AsyncGenerator[T]) -> asyncio.Task[tuple[T, ...]]:
    """Start a task for the stream's next item. It returns an empty tuple at the end."""

    async def step() -> tuple[T, ...]:
        try:
            return (await anext(stream),)
        except StopAsyncIteration:
            return ()

    return asyncio.create_task(step())
