"""Measure the cost of a growing pool in the engine: `python -m benchmarks.pool_growth`.

Each request chooses one adapter by Zipf's law among all published ones; the bank has room for 32. Pools take turns.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import typer

from benchmarks import plots
from benchmarks.engine_cases import (
    NUM_NEW,
    NUM_ROWS,
    RANK,
    Prompt,
    Prompts,
    Quick,
    console,
    rounds_within,
    sampling,
    shown,
    table_of,
)
from benchmarks.results_file import write_results
from benchmarks.stored_pool import StoredPool
from gpu_worker.front.request.request import Delta, Job
from lora_store import Plan

POOLS = (8, 64, 1000)
EXPONENT = 1.0
BANK_ADAPTERS = 32
NUM_OUTSTANDING = 2 * NUM_ROWS  # a full batch, and as many waiting requests


@dataclass(frozen=True, slots=True)
class Measured:
    """The measurements of one pool in one round."""

    tokens_s: float
    bank_hits: float  # share of the requests
    host_hits: float
    fetches: float


class Traffic:
    """An endless sequence of requests for a pool of `num_adapters`."""

    def __init__(self, pool: StoredPool, prompts: Prompts, num_adapters: int, seed: int) -> None:
        self._pool, self._prompts, self._num_adapters, self._seed = pool, prompts, num_adapters, seed

    def __iter__(self) -> Iterator[tuple[Prompt, Plan]]:
        draw = np.random.default_rng(self._seed)
        weights = np.arange(1, self._num_adapters + 1) ** -EXPONENT
        for block in itertools.count():
            numbers = draw.choice(self._num_adapters, size=100, p=weights / weights.sum())
            prompts = self._prompts(1000 * self._seed + block, len(numbers))
            for prompt, number in zip(prompts, numbers, strict=True):
                yield prompt, self._pool.plan("selection", int(number))


def closed_loop(pool: StoredPool, traffic: Traffic, count: int, num_new: int = NUM_NEW) -> Measured:
    """Answer `count` requests, with as many waiting as running, after a warm-up batch."""
    engine, arriving = pool.engine, iter(traffic)
    ends: list[Delta | Exception] = []

    def sink(event: Delta | Exception) -> None:
        if isinstance(event, Exception) or event.finish_reason is not None:
            ends.append(event)

    num_asked = 0
    while (num_ended := len(ends)) < NUM_ROWS + count:
        while num_asked < num_ended + NUM_OUTSTANDING:
            prompt, plan = next(arriving)
            engine.submit(engine.prepare(Job(str(num_asked), prompt.text, plan, sampling(num_new)), sink))
            num_asked += 1
        engine.loaded.clear()
        if not engine.step():
            engine.loaded.wait()
        if len(ends) < NUM_ROWS:
            began, before = time.perf_counter(), engine.counters.copy()
    seconds, after = time.perf_counter() - began, engine.counters.copy()
    assert not any(isinstance(end, Exception) for end in ends), "a request failed"
    for row in (*engine.running, *engine.waiting):
        engine.cancel(row)
    asked = after.num_requests - before.num_requests
    return Measured(
        (after.num_new_tokens - before.num_new_tokens) / seconds,
        (after.num_bank_hits - before.num_bank_hits) / asked,
        (after.num_host_hits - before.num_host_hits) / asked,
        (after.num_fetches - before.num_fetches) / asked,
    )


def measure(pools: Sequence[int], rounds: Iterator[int], count: int) -> list[dict[int, Measured]]:
    """Measure every pool once per round."""
    found = []
    with StoredPool(bank_rank_rows=RANK * BANK_ADAPTERS, max_batch_size=NUM_ROWS) as pool:
        pool.publish(max(pools))
        prompts = Prompts(pool.engine.base.tokenizer)
        closed_loop(pool, Traffic(pool, prompts, pools[0], seed=0), NUM_ROWS, num_new=4)  # warms up
        for number in rounds:
            found.append({size: closed_loop(pool, Traffic(pool, prompts, size, number), count) for size in pools})
            speeds = ", ".join(f"{size} published {measured.tokens_s:.0f}" for size, measured in found[-1].items())
            console.print(f"round {number}, tokens/s: {speeds}")
    return found


def ratio(found: Sequence[Mapping[int, Measured]], size: int, over: int) -> float:
    return statistics.median(round_[size].tokens_s / round_[over].tokens_s for round_ in found)


def report(found: Sequence[Mapping[int, Measured]], pools: Sequence[int]) -> str:
    table = table_of("published", "tokens/s", f"/ {pools[0]}", "in the bank", "in host memory", "fetched")
    for size in pools:
        medians = [
            statistics.median(getattr(round_[size], name) for round_ in found)
            for name in ("tokens_s", "bank_hits", "host_hits", "fetches")
        ]
        shares = [f"{100 * share:.0f} %" for share in medians[1:]]
        table.add_row(f"{size:,}", f"{medians[0]:.0f}", f"{ratio(found, size, pools[0]):.2f}", *shares)
    return shown(table)


def main(
    rounds: Annotated[int, typer.Option(help="each pool once per round")] = 3,
    minutes: Annotated[float, typer.Option(help="start no round that would end later, not counting publishing")] = 3.5,
    count: Annotated[int, typer.Option(help="requests for each pool in a round")] = 128,
    quick: Quick = False,
) -> None:
    """Measure Gemma-3-270M in bfloat16: 32 rows, 20 to 80 tokens, 64 new ones, rank 8, a bank for 32 adapters."""
    pools = (8, 40) if quick else POOLS
    found = measure(pools, rounds_within(1 if quick else rounds, minutes), 16 if quick else count)
    table = report(found, pools)
    if quick:
        return
    figures = {"pool1000_over_pool8": ratio(found, 1000, 8), "pool64_over_pool8": ratio(found, 64, 8)}
    runs = [{"published": size, **asdict(measured)} for round_ in found for size, measured in round_.items()]
    write_results("pool_growth", figures=figures, table=table, runs=runs)
    speeds = {f"{size:,} published": statistics.median(r[size].tokens_s for r in found) for size in pools}
    plots.bars("pool_growth/plot", speeds, "tokens/s, one adapter a row, a bank for 32")


if __name__ == "__main__":
    typer.run(main)
