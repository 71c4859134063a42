"""The speed of one engine of `benchmarks.gpu`: tokens per second, times to the first token, and a floor."""

from __future__ import annotations

import statistics
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass

import torch

from benchmarks.engine_cases import plans
from benchmarks.gpu.hosting import Hosted, job
from lora_store import Plan, Strategy

_RANDOM = "the quick brown fox jumps over the lazy dog and "
_TTFT_ROUNDS = 5
Measured = dict[str, float | str]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    batches: tuple[int, ...]  # rows
    active: tuple[int, ...]  # adapters that the rows use
    prompt_tokens: int
    new_tokens: int
    rank: int = 8


FULL = Sizes((1, 8, 32, 128), (8, 32, 128), 128, 64)
SMALL = Sizes((1, 3), (3, 4), 12, 4, rank=2)  # a mixture is of three


@dataclass(frozen=True, slots=True)
class Cell:
    """A batch and what its rows ask for."""

    strategy: Strategy
    active: int
    rows: int


@dataclass(frozen=True, slots=True)
class Floor:
    """The shortest possible time of a decode step: each byte that it needs is read once from the device's memory."""

    bytes_per_s: float
    weight_bytes: int
    adapter_bytes: int  # of one adapter
    kv_token_bytes: int

    def tokens_per_s(self, cell: Cell, plan_digests: int, context: int) -> float:
        """Return the highest possible rate.

        `plan_digests`: number of different adapters in the batch. `context`: tokens of a row.
        """
        read = self.weight_bytes + plan_digests * self.adapter_bytes + cell.rows * context * self.kv_token_bytes
        return cell.rows * self.bytes_per_s / read


def cells(sizes: Sizes) -> Iterator[Cell]:
    """Yield the large batches last. A batch uses at most three adapters a row."""
    for rows in sizes.batches:
        yield Cell("base", 0, rows)
        for strategy, most in (("selection", rows), ("mixture", 3 * rows)):
            for active in sizes.active:
                if active <= max(most, sizes.active[0]):
                    yield Cell(strategy, active, rows)  # type: ignore[arg-type]


async def run_speed(hosted: Hosted, sizes: Sizes, floor: Floor, ends_at: float) -> AsyncIterator[Measured]:
    """Yield one row for each cell until `ends_at`, by time.monotonic; first the times to the first token."""
    for number in range(max(sizes.active)):
        hosted.add(str(number), 0, rank=sizes.rank, size=0.01)
    yield await first_tokens(hosted, sizes)
    for cell in cells(sizes):
        if time.monotonic() > ends_at:
            yield {"what": "left out for lack of time", "from": str(cell)}
            return
        yield await _measure(hosted, cell, sizes, floor)


async def first_tokens(hosted: Hosted, sizes: Sizes) -> Measured:
    """Return the median seconds to the first token of a mixture of three, whose weights are on the device or not."""
    [plan] = plans("mixture", 3, 1)
    digests = [adapter.weights_digest for adapter in plan.adapters]
    cold, hot = [], []
    for number in range(_TTFT_ROUNDS):
        await hosted.engine.forget(digests)
        cold.append(await _first_token(hosted, plan, f"cold {number}", sizes))
        hot.append(await _first_token(hosted, plan, f"hot {number}", sizes))
    return {"what": "first token", "cold_s": statistics.median(cold[1:]), "hot_s": statistics.median(hot[1:])}


async def _first_token(hosted: Hosted, plan: Plan, words: str, sizes: Sizes) -> float:
    started = time.perf_counter()
    async for delta in hosted.engine.stream(job(_prompt(words, sizes), plan, num_new=1)):
        if delta is not None:
            return time.perf_counter() - started
    raise AssertionError("a stream has a delta")


async def _measure(hosted: Hosted, cell: Cell, sizes: Sizes, floor: Floor) -> Measured:
    """Return the cell's rates. Decoding is the difference between a run and its prompts alone."""
    asked = plans(cell.strategy, cell.active, cell.rows) if cell.active else [*plans("base", 0, cell.rows)]

    async def seconds(words: str, num_new: int) -> float:
        jobs = [job(_prompt(f"{words} {n}", sizes), plan, num_new=num_new) for n, plan in enumerate(asked)]
        started = time.perf_counter()
        await hosted.answers(jobs)
        return time.perf_counter() - started

    name = f"{cell.strategy} {cell.active} x{cell.rows}"
    await seconds(f"warm {name}", 2)
    prompts_s = await seconds(f"prompts {name}", 1)
    whole_s = await seconds(f"whole {name}", sizes.new_tokens)
    digests = {adapter.weights_digest for plan in asked for adapter in plan.adapters}
    decode_s = max(whole_s - prompts_s, 1e-9)
    return {
        "what": name,
        "rows": cell.rows,
        "prompts_s": prompts_s,
        "decode_tokens_per_s": cell.rows * (sizes.new_tokens - 1) / decode_s,
        "tokens_per_s": cell.rows * sizes.new_tokens / whole_s,
        "floor_tokens_per_s": floor.tokens_per_s(cell, len(digests), sizes.prompt_tokens + sizes.new_tokens // 2),
    }


def floor_of(hosted: Hosted, device: str, weight_bytes: int, kv_token_bytes: int, rank: int) -> Floor:
    itemsize = 2 if device == "cuda" else 4
    values = sum(out + in_ for out, in_ in hosted.engine.module_shapes.values())
    return Floor(bandwidth(device), weight_bytes, rank * values * itemsize, kv_token_bytes)


def bandwidth(device: str) -> float:
    """Return the bytes per second of copying within the device's memory, reads and writes counted."""
    size = 1 << (30 if device == "cuda" else 26)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size / best


def shown(row: Mapping[str, float | str]) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())


def _prompt(words: str, sizes: Sizes) -> str:
    """Return a prompt of as many bytes as it has tokens, different from all others at its beginning."""
    return (f"{words} " + _RANDOM * sizes.prompt_tokens)[: sizes.prompt_tokens]
