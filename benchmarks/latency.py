"""Measure the time to the first token and the gaps between tokens, in the engine: `python -m benchmarks.latency`.

Time to first token: a mixture of three adapters in the bank (hot) or on disk (cold), alone and while other rows run.
Gaps between tokens of running rows: without disturbance; while ten one-token requests per second join, each for an
adapter in the bank, or on disk; while a prompt of 2,000 tokens joins. Compared cases alternate.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
import typer

from benchmarks import plots
from benchmarks.engine_cases import RANK, Prompts, Quick, console, rounds_within, sampling, shown, table_of
from benchmarks.results_file import write_results
from benchmarks.stored_pool import StoredPool
from gpu_worker.front.request.request import Job
from gpu_worker.native.engine import NativeEngine
from lora_store import Plan

NUM_RUNNING, NUM_STEPS = 24, 128  # measured rows, and tokens per row
NUM_HOT = 8  # adapters of the running rows, three per row
NUM_COLD = 120  # in turn, so that bank and host memory (16 MB) have evicted an adapter before its next request
LOADS_A_SECOND = 10
MAX_LEN, LONG_PROMPT, MOST_NEW = 2304, 2000, 2200
PROMPT, ARRIVING = (20, 80), (8, 8)
KINDS = QUIET, HOT, COLD, LONG = "quiet", "requests for hot adapters", "requests for cold adapters", "a long prompt"


class Bench:
    """One engine behind its thread, as in a worker, with undelayed streams. Use it in one event loop only."""

    def __init__(self, pool: StoredPool) -> None:
        self._pool = pool
        self._loop = NativeEngine(pool.engine, stream_interval_ms=0)
        self._prompts = Prompts(pool.engine.base.tokenizer)
        self._numbers = itertools.count()
        self._cold = itertools.cycle(range(NUM_HOT, NUM_HOT + NUM_COLD))

    def close(self) -> None:
        self._loop.stop()

    def job(self, plan: Plan, num_new: int, lengths: tuple[int, int] = PROMPT) -> Job:
        number = next(self._numbers)
        [prompt] = self._prompts(number, 1, lengths)
        return Job(str(number), prompt.text, plan, sampling(num_new))

    async def first_token_ms(self, plan: Plan, lengths: tuple[int, int] = PROMPT) -> float:
        return await self._milliseconds(self.job(plan, 1, lengths))

    async def _milliseconds(self, job: Job) -> float:
        started = time.perf_counter()
        async for _ in self._loop.stream(job):
            pass
        return 1000 * (time.perf_counter() - started)

    async def first_tokens(self, count: int) -> dict[str, list[float]]:
        """Return milliseconds, cold and hot in turn: forget three adapters, then send one request twice."""
        found: dict[str, list[float]] = defaultdict(list)
        for _ in range(count):
            plan = self._pool.plan("mixture", *[next(self._cold) for _ in range(3)])
            digests = [adapter.weights_digest for adapter in plan.adapters]
            while not await self._loop.forget(digests):
                await asyncio.sleep(0.01)
            job = self.job(plan, 1)
            found["cold"].append(await self._milliseconds(job))
            found["hot"].append(await self._milliseconds(replace(job, request_id=f"{job.request_id}-hot")))
        return found

    async def beside_running(self, work: Callable[[], Awaitable[dict[str, list[float]]]]) -> dict[str, list[float]]:
        """Return the result of `work`, called while other rows run."""
        rows = await self._running(MOST_NEW)
        try:
            return await work()
        finally:
            for row in rows:
                row.cancel()
            await asyncio.gather(*rows, return_exceptions=True)

    async def gaps(self, kind: str, num_steps: int) -> list[float]:
        """Return the milliseconds between tokens of the running rows, once all of them have their first token."""
        rows = await self._running(num_steps)
        began = time.perf_counter()
        disturbance = asyncio.create_task(self._disturb(kind))
        streams = await asyncio.gather(*rows)
        disturbance.cancel()
        await asyncio.gather(disturbance, return_exceptions=True)
        return [gap for stream in streams for gap in _gaps(stream, began)]

    async def _running(self, num_new: int) -> list[asyncio.Task[list[tuple[float, int]]]]:
        """Start rows, and return them once all have their first token."""
        started = [asyncio.Event() for _ in range(NUM_RUNNING)]
        rows = [asyncio.create_task(self._stream(row, num_new, event)) for row, event in enumerate(started)]
        await asyncio.gather(*[event.wait() for event in started])
        return rows

    async def _stream(self, row: int, num_new: int, started: asyncio.Event) -> list[tuple[float, int]]:
        """Return (time, tokens so far) at each delta."""
        plan = self._pool.plan("mixture", *[(3 * row + place) % NUM_HOT for place in range(3)])
        found = []
        async for delta in self._loop.stream(self.job(plan, num_new)):
            if delta is not None:
                found.append((time.perf_counter(), delta.num_new_tokens))
                started.set()
        return found

    async def _disturb(self, kind: str) -> None:
        """Send disturbing requests until cancelled."""
        async with asyncio.TaskGroup() as asked:
            if kind == LONG:
                asked.create_task(self.first_token_ms(self._pool.plan("mixture", 0, 1, 2), (LONG_PROMPT, LONG_PROMPT)))
            elif kind in (HOT, COLD):
                for number in itertools.count():
                    adapter = number % NUM_HOT if kind == HOT else next(self._cold)
                    asked.create_task(self.first_token_ms(self._pool.plan("selection", adapter), ARRIVING))
                    await asyncio.sleep(1 / LOADS_A_SECOND)


def _gaps(stream: Sequence[tuple[float, int]], began: float) -> Iterator[float]:
    """Yield the gaps. A delta of several tokens, such as the parts of one character, counts as equal gaps."""
    for (before, num_before), (at, num_tokens) in itertools.pairwise(stream):
        if before >= began:
            num = num_tokens - num_before
            yield from [1000 * (at - before) / num] * num


async def measure(
    pool: StoredPool, rounds: int, minutes: float, num_first: int, num_steps: int
) -> tuple[dict[str, list[float]], list[dict[str, list[float]]]]:
    """Return (milliseconds to first tokens by kind, gaps by kind in each round)."""
    bench = Bench(pool)
    try:
        await bench.first_tokens(3)
        firsts = {f"{what}, alone": times for what, times in (await bench.first_tokens(num_first)).items()}
        beside = await bench.beside_running(lambda: bench.first_tokens(num_first))
        firsts |= {f"{what}, {NUM_RUNNING} rows running": times for what, times in beside.items()}
        for what, times in firsts.items():
            console.print(f"first token, {what}: {statistics.median(times):.0f} ms")
        found: list[dict[str, list[float]]] = []
        for number in rounds_within(rounds, minutes):
            found.append({kind: await bench.gaps(kind, num_steps) for kind in KINDS})
            p99s = ", ".join(f"{kind} {np.percentile(times, 99):.0f}" for kind, times in found[-1].items())
            console.print(f"round {number}, p99 of the gaps, ms: {p99s}")
        return firsts, found
    finally:
        bench.close()


def p99_over(found: Sequence[dict[str, list[float]]], kind: str, over: str) -> float:
    """Return the median over rounds of the ratio of one kind's p99 to another's in the same round."""
    return statistics.median(np.percentile(r[kind], 99) / np.percentile(r[over], 99) for r in found)


def report(firsts: dict[str, list[float]], found: Sequence[dict[str, list[float]]]) -> tuple[str, dict[str, float]]:
    gaps = {kind: [gap for round_ in found for gap in round_[kind]] for kind in KINDS}
    table = table_of("ms", "count", "p50", "p90", "p99", "max")
    rows = {f"first token, {what}": times for what, times in firsts.items()}
    rows |= {f"between tokens, {kind}": times for kind, times in gaps.items()}
    for what, times in rows.items():
        p50, p90, p99 = np.percentile(times, [50, 90, 99])
        table.add_row(what, f"{len(times):,}", *[f"{value:.1f}" for value in (p50, p90, p99, max(times))])
    busy = f"{NUM_RUNNING} rows running"
    medians = {what: statistics.median(times) for what, times in firsts.items()}
    figures = {
        "ttft_cold_over_hot": medians["cold, alone"] / medians["hot, alone"],
        "ttft_cold_over_hot_busy": medians[f"cold, {busy}"] / medians[f"hot, {busy}"],
        "itl_p99_loading_over_quiet": p99_over(found, COLD, QUIET),
        "itl_p99_loading_over_hot_requests": p99_over(found, COLD, HOT),
        "itl_p99_long_prompt_over_without": p99_over(found, LONG, QUIET),
    }
    return shown(table), figures


def main(
    rounds: Annotated[int, typer.Option(help="rounds of gaps, each kind once")] = 6,
    minutes: Annotated[float, typer.Option(help="no round of gaps begins that would end later")] = 3.5,
    first_tokens: Annotated[int, typer.Option(help="first tokens, hot and cold, alone and with running rows")] = 60,
    quick: Quick = False,
) -> None:
    """Gemma-3-270M bfloat16, prompts of 20 to 80 tokens, mixtures of 3 over 8 adapters, rank 8 in all modules."""
    with StoredPool(max_model_len=MAX_LEN, host_cache_bytes=16 << 20, bank_rank_rows=RANK * 32) as pool:
        pool.publish(NUM_HOT + NUM_COLD)
        counts = (1, 1.0, 3, 16) if quick else (rounds, minutes, first_tokens, NUM_STEPS)
        firsts, found = asyncio.run(measure(pool, *counts))
    table, figures = report(firsts, found)
    if quick:
        return
    runs = [{kind: dict(zip(("p50", "p99"), np.percentile(times, [50, 99]), strict=True)) for kind, times in r.items()}
            for r in found]  # fmt: skip
    write_results(
        "latency", figures=figures, table=table, runs=[{"first_tokens_ms": firsts}, *runs], keeps_other_processors=True
    )
    plots.bars("latency/plot", {kind: float(np.median([r[kind]["p99"] for r in runs])) for kind in KINDS},
               "p99 between tokens of running rows, ms, while")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
