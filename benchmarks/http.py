"""Compare the whole application over HTTP with the engine alone: `python -m benchmarks.http`.

Both run on the same cores in turn. The engine alone runs in the client's process, with the worker's threads, niceness
and stream interval, while the server is idle. Prompts are texts of known length. `auto` routes by them, first with
texts that are new to the encoder, then with others that `/v1/route` encoded: no prompt is answered twice by one plan,
as the prefix cache would skip it. The overhead of a single request is its time at the client
minus the time from the Worker's call of its engine to the last token of the same request, which is in the Worker's log.
"""

from __future__ import annotations

import asyncio
import os
import re
import statistics
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.table import Table

from benchmarks import plots
from benchmarks.cpu_times import cpu_ms
from benchmarks.engine_cases import (
    NUM_NEW,
    NUM_ROWS,
    Loaded,
    Prompt,
    Quick,
    console,
    in_turn,
    plans,
    random_modules,
    rounds_within,
    sampling,
    shown,
    table_of,
    with_range,
)
from benchmarks.results_file import write_results
from deployments.auth.private_files import sessions_folder
from deployments.cli.local_server import Server
from deployments.config.app import AppConfig
from gpu_worker.front.request.request import Job
from gpu_worker.native.engine import NativeEngine
from lora_store import Plan, Sample, Strategy, write_peft_folder

NUM_ADAPTERS, NUM_SAMPLES = 8, 20
PER_STREAM = 2  # consecutive requests in each of 32 streams
SINGLE_TOKENS = 8
ENGINE_ONE, HTTP_ONE = "engine alone, selection", "HTTP, adapters named"
ENGINE_MIX, HTTP_AUTO, HTTP_KNOWN = "engine alone, mixture of 3", "HTTP, auto", "HTTP, auto, texts the encoder knows"
KINDS = ENGINE_ONE, HTTP_ONE, ENGINE_MIX, HTTP_AUTO, HTTP_KNOWN
CPU = "CPU ms for 1,000 tokens"
OWN = "its engine's own"
_ENDED = re.compile(r"job (\S+) ended \(length\) after (\S+) s")

POOL_NAMES = [f"adapter-{number}" for number in range(NUM_ADAPTERS)]

Ask = Callable[[int, Prompt, int], Awaitable[None]]
"""Takes (row, prompt, new tokens) and returns after the last token."""


def write_pool(folder: Path, loaded: Loaded, base: str) -> None:
    """Write the engine's random adapters as PEFT folders, with random words as samples."""
    for number, name in enumerate(POOL_NAMES):
        samples = [Sample(prompt.text) for prompt in loaded.prompts(10_000 + number, NUM_SAMPLES)]
        modules = random_modules(number, loaded.engine.bank.shapes)
        write_peft_folder(folder / name, modules, base_model=base, samples=samples)


class Bench:
    """Sends the same requests to the server and to the engine alone."""

    def __init__(self, loaded: Loaded, config: AppConfig, url: str, client: httpx.AsyncClient) -> None:
        self.prompts, self._url, self._client = loaded.prompts, url, client
        self._request_id = ""  # the last one sent
        self._loop = NativeEngine(loaded.engine, niceness=config.worker.niceness)
        self._ways: dict[str, Ask] = {
            ENGINE_ONE: self._engine("selection"),
            HTTP_ONE: lambda row, prompt, num_new: self._post(prompt, num_new, model=POOL_NAMES[row % NUM_ADAPTERS]),
            ENGINE_MIX: self._engine("mixture"),
            HTTP_AUTO: self._auto,
            HTTP_KNOWN: self._auto,
        }

    def close(self) -> None:
        self._loop.stop()

    def _engine(self, strategy: Strategy) -> Ask:
        by_row: list[Plan] = plans(strategy, NUM_ADAPTERS)

        async def ask(row: int, prompt: Prompt, num_new: int) -> None:
            job = Job("alone", prompt.text, by_row[row], sampling(num_new))
            deltas = [delta async for delta in self._loop.stream(job) if delta is not None]
            assert deltas[-1].num_new_tokens == num_new

        return ask

    async def _auto(self, row: int, prompt: Prompt, num_new: int) -> None:
        """Send a request to `auto`. `min_score` excludes the base model, however low the scores are."""
        await self._post(prompt, num_new, model="auto", lora={"strategy": "mixture", "k": 3, "min_score": -1.0})

    async def _post(self, prompt: Prompt, num_new: int, **fields: Any) -> None:
        body = {"prompt": prompt.text, "max_tokens": num_new, "temperature": 0, "ignore_eos": True, "stream": True}
        body |= {"stream_options": {"include_usage": True}, **fields}
        last, self._request_id = b"", uuid.uuid4().hex
        headers = {"x-request-id": self._request_id}
        async with self._client.stream("POST", f"{self._url}/v1/completions", json=body, headers=headers) as response:
            async for piece in response.aiter_bytes():
                last = (last + piece)[-2000:]
        assert response.status_code == 200 and f'"completion_tokens": {num_new}'.encode() in last, last

    async def tokens_s(self, kind: str, prompts: Sequence[Prompt], num_new: int) -> float:
        """Return tokens per second of 32 streams, each with `PER_STREAM` consecutive prompts."""

        async def stream(row: int) -> None:
            for prompt in prompts[row::NUM_ROWS]:
                await self._ways[kind](row, prompt, num_new)

        started = time.perf_counter()
        await asyncio.gather(*[stream(row) for row in range(NUM_ROWS)])
        return len(prompts) * num_new / (time.perf_counter() - started)

    async def single_ms(self, kind: str, prompt: Prompt) -> float:
        started = time.perf_counter()
        await self._ways[kind](0, prompt, SINGLE_TOKENS)
        return 1000 * (time.perf_counter() - started)

    async def route_ms(self, prompt: Prompt) -> float:
        body = {"prompt": [prompt.text], "lora": {"strategy": "mixture", "k": 3, "min_score": -1.0}}
        started = time.perf_counter()
        (await self._client.post(f"{self._url}/v1/route", json=body)).raise_for_status()
        return 1000 * (time.perf_counter() - started)

    async def singles(self, count: int) -> list[dict[str, float]]:
        """Send one request at a time, in every way in turn with the same prompt.

        The encoder's time is the route of a new text minus the route of the same text again.
        """
        found, sent = [], []
        for number, prompt in enumerate(self.prompts(777, count + 1)):
            times = {"route, new text": await self.route_ms(prompt), "route, known text": await self.route_ms(prompt)}
            ids: dict[str, str] = {}
            for kind in (ENGINE_ONE, HTTP_ONE, ENGINE_MIX, HTTP_KNOWN):
                times[kind] = await self.single_ms(kind, prompt)
                ids[kind] = self._request_id
            if number:
                found.append(times)
                sent.append(ids)
        own_ms = engine_ms()
        for times, ids in zip(found, sent, strict=True):
            times |= {f"{kind}, {OWN}": own_ms[ids[kind]] for kind in (HTTP_ONE, HTTP_KNOWN)}
        return found


def engine_ms() -> dict[str, float]:
    """Return, by request id, the milliseconds from the Worker's call of its engine to the last token."""
    logs = sessions_folder(os.environ, os.geteuid()) / "session_latest" / "logs" / "serve"
    text = "".join(path.read_text() for path in logs.glob("replica_*_Worker_*.log"))
    return {request_id: 1000 * float(seconds) for request_id, seconds in _ENDED.findall(text)}


async def measure(
    bench: Bench, rounds: int, minutes: float, num_singles: int, num_new: int
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Return (tokens per second by kind in each round, and CPU times; milliseconds of single requests)."""
    for kind in KINDS:
        await bench.tokens_s(kind, bench.prompts(0, NUM_ROWS), 4)
    found = []
    for number in rounds_within(rounds, minutes):
        prompts = bench.prompts(number, NUM_ROWS * PER_STREAM)
        known = bench.prompts(1000 + number, NUM_ROWS * PER_STREAM)
        for prompt in known:
            await bench.route_ms(prompt)
        speeds: dict[str, float] = {}
        used: dict[str, float] = {}
        for kind in in_turn(KINDS, number):
            before = cpu_ms()
            speeds[kind] = await bench.tokens_s(kind, known if kind == HTTP_KNOWN else prompts, num_new)
            spent = cpu_ms() - before
            used |= {f"{kind}, {CPU}: {name}": 1000 * ms / len(prompts) / num_new for name, ms in spent.items()}
        found.append({kind: speeds[kind] for kind in KINDS} | used)
        console.print(f"round {number}: " + ", ".join(f"{kind} {found[-1][kind]:.0f}" for kind in KINDS))
    console.print(f"{num_singles} single requests of each kind")
    return found, await bench.singles(num_singles)


def figures_of(found: Sequence[dict[str, float]], singles: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the medians of values compared within a round, or for one prompt."""

    def over(kind: str, other: str) -> float:
        return statistics.median(round_[kind] / round_[other] for round_ in found)

    def extra_ms(what: str, other: str) -> float:
        return statistics.median(times[what] - times[other] for times in singles)

    return {
        "http_over_engine": over(HTTP_ONE, ENGINE_ONE),
        "auto_over_engine": over(HTTP_AUTO, ENGINE_MIX),
        "auto_known_texts_over_engine": over(HTTP_KNOWN, ENGINE_MIX),
        "ingress_overhead_p50_ms": extra_ms(HTTP_KNOWN, f"{HTTP_KNOWN}, {OWN}"),
        "ingress_overhead_named_p50_ms": extra_ms(HTTP_ONE, f"{HTTP_ONE}, {OWN}"),
        "http_over_engine_alone_p50_ms": extra_ms(HTTP_ONE, ENGINE_ONE),
        "auto_over_engine_alone_p50_ms": extra_ms(HTTP_KNOWN, ENGINE_MIX),
        "encoder_p50_ms": extra_ms("route, new text", "route, known text"),
    }


def report(found: Sequence[dict[str, float]], singles: Sequence[dict[str, float]]) -> tuple[str, dict[str, float]]:
    medians = {kind: statistics.median(round_[kind] for round_ in found) for kind in KINDS}
    table = table_of(f"{NUM_ROWS} streams", "tokens/s", "/ engine alone")
    for kind in KINDS:
        alone = ENGINE_ONE if kind in (ENGINE_ONE, HTTP_ONE) else ENGINE_MIX
        table.add_row(kind, f"{medians[kind]:.0f}", with_range([round_[kind] / round_[alone] for round_ in found]))
    text = shown(table) + shown(cpu_table(found))
    table = table_of(f"one request at a time, {SINGLE_TOKENS} tokens", "count", "p50 ms", "p90 ms")
    for what in singles[0]:
        times = sorted(times[what] for times in singles)
        p90 = times[int(0.9 * len(times))]
        table.add_row(what, str(len(times)), f"{statistics.median(times):.1f}", f"{p90:.1f}")
    return text + shown(table), medians


def cpu_table(found: Sequence[dict[str, float]]) -> Table:
    """Return the medians over rounds of the CPU time of each process, by kind of request."""
    names = sorted({key.split(f"{CPU}: ")[1] for round_ in found for key in round_ if CPU in key})
    table = table_of(CPU, *names)
    for kind in KINDS:
        medians = [statistics.median(round_.get(f"{kind}, {CPU}: {name}", 0) for round_ in found) for name in names]
        table.add_row(kind, *(f"{value:.0f}" for value in medians))
    return table


def main(
    rounds: Annotated[int, typer.Option(help="rounds of 32 streams, each kind once")] = 3,
    minutes: Annotated[float, typer.Option(help="start no round that would end later")] = 3.0,
    singles: Annotated[int, typer.Option(help="single requests of each kind")] = 80,
    proxy: Annotated[bool, typer.Option(help="through Serve's proxy, for comparison; write nothing")] = False,
    quick: Quick = False,
) -> None:
    """Measure Gemma-3-270M in bfloat16: prompts of 20 to 80 tokens, 64 new ones, 8 adapters of rank 8."""
    loaded = Loaded(NUM_ADAPTERS)
    with tempfile.TemporaryDirectory() as scratch:
        write_pool(Path(scratch, "adapters"), loaded, loaded.config.base_model)
        config = AppConfig(store_uri=f"{scratch}/pool", preload=(Path(scratch, "adapters"),))
        with Server(config, port=0, uses_proxy=proxy) as server:
            server.prepare(console.print)
            url = server.start()
            console.print(server.wait_ready(timeout_s=300))
            counts = (1, 1.0, 3, 8) if quick else (rounds, minutes, singles, NUM_NEW)
            found, single = asyncio.run(run(loaded, config, url, counts))
    text, medians = report(found, single)
    if quick or proxy:
        return
    write_results(
        "http", figures=figures_of(found, single), table=text, runs=[*found, *single], keeps_other_processors=True
    )
    plots.bars("http/plot", medians, f"tokens/s, {NUM_ROWS} streams")


async def run(
    loaded: Loaded, config: AppConfig, url: str, counts: tuple[int, float, int, int]
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Call `measure` with its own client and engine thread, and stop both."""
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=NUM_ROWS)) as client:
        bench = Bench(loaded, config, url, client)
        try:
            return await measure(bench, *counts)
        finally:
            bench.close()


if __name__ == "__main__":
    typer.run(main)
