"""What the way through the door costs, one request at a time: `python -m benchmarks.door`.

Each prompt is asked over HTTP as a stream, and its plan run by an engine of this process; both have the same model and
threads, and one waits while the other works. The encoder is timed here too: in the server it runs once a prompt.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.results_file import machine, write_results
from deployments.config import AppConfig
from deployments.server import Server
from gpu_worker.engine import Engine
from gpu_worker.prompts import Message
from gpu_worker.request import Delta, Job, SamplingParams
from lora_store import AdapterWeights, LoraStore, Plan, PlannedAdapter, decode_weights
from retriever_svc import Encoder

EXAMPLES = Path(__file__).parents[1] / "examples"
NUM_NEW = 16
NUM_WARM = 12  # prompts, one a task: every adapter is in both banks after them
console = Console(width=100)


def held_out(count: int) -> list[str]:
    """So many prompts the adapters were not trained on, the tasks taken in turn."""
    files = sorted((EXAMPLES / "starter_heldout").glob("*.jsonl"))
    tasks = [[json.loads(line)["input"] for line in path.read_text().splitlines()] for path in files]
    turns = [prompt for turn in zip(*tasks, strict=False) for prompt in turn]
    if count > len(turns):
        raise SystemExit(f"there are {len(turns)} held-out prompts, {count} were asked for")
    return turns[:count]


def over_http(client: httpx.Client, model: str, prompt: str) -> tuple[float, float, dict[str, Any]]:
    """(ms to the first token, ms to the end, the plan that answered)."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": NUM_NEW, "temperature": 0}
    body |= {"stream": True, "ignore_eos": True}
    events: list[tuple[float, dict[str, Any]]] = []
    started = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                events.append((time.perf_counter(), json.loads(line.removeprefix("data: "))))
    ended = time.perf_counter()
    return 1000 * (events[1][0] - started), 1000 * (ended - started), events[0][1]["lora"]


class EngineHere:
    """The server's engine once more, over the same store."""

    def __init__(self, config: AppConfig) -> None:
        self._store = LoraStore(config.store_uri, accepts_base=config.accepted_bases)
        self._engine, self._template = Engine(config.worker_config(), self._fetch), config.template

    def _fetch(self, digest: str) -> Future[AdapterWeights]:
        future: Future[AdapterWeights] = Future()
        future.set_result(decode_weights(digest, self._store.load(digest)))
        return future

    def run(self, prompt: str, told: dict[str, Any]) -> tuple[float, float]:
        """(ms to the first token, ms to the last) of the plan that an answer told."""
        live = self._store.snapshot().records
        rows = [(live["local", adapter["name"]], adapter["weight"]) for adapter in told["adapters"]]
        planned = tuple(PlannedAdapter(record.ref, record.weights_digest, weight) for record, weight in rows)
        sampling = SamplingParams(max_tokens=NUM_NEW, temperature=0, ignore_eos=True)
        at: list[float] = []
        job = Job("x", (Message("user", prompt),), Plan(told["strategy"], planned), sampling, self._template)

        def sink(event: Delta | Exception) -> None:
            if isinstance(event, Exception):
                raise event
            at.append(time.perf_counter())

        row = self._engine.prepare(job, sink)
        started = time.perf_counter()
        self._engine.submit(row)
        self._engine.run_until_idle()
        return 1000 * (at[0] - started), 1000 * (at[-1] - started)


def measure(folder: Path, count: int) -> list[dict[str, float]]:
    """One row of milliseconds a prompt, after those that warm up."""
    config = AppConfig(store_uri=str(folder / "pool"), preload=(EXAMPLES / "starter_pool",))
    found: list[dict[str, float]] = []
    with Server(config, port=0) as server:
        server.prepare(console.print)
        url = server.start()
        server.wait_ready(timeout_s=600)
        engine, encoder = EngineHere(config), Encoder(config.retrieval.encoder)
        with httpx.Client(base_url=url, timeout=120) as client:
            for prompt in held_out(NUM_WARM + count):
                row: dict[str, float] = {}
                for model in ("auto", config.served_base_name):
                    first, whole, plan = over_http(client, model, prompt)
                    engine_first, engine_whole = engine.run(prompt, plan)
                    name = "auto" if model == "auto" else "base"
                    row |= {f"{name} first": first - engine_first, f"{name} whole": whole - engine_whole}
                    row |= {f"{name} engine first": engine_first, f"{name} engine whole": engine_whole}
                started = time.perf_counter()
                encoder.encode([prompt])
                row["encoder"] = 1000 * (time.perf_counter() - started)
                found.append(row)
    return found[NUM_WARM:]


def quantiles(rows: Sequence[dict[str, float]], name: str) -> tuple[float, float]:
    """(p50, p90)."""
    values = [row[name] for row in rows]
    return statistics.median(values), statistics.quantiles(values, n=10)[-1]


def main(prompts: Annotated[int, typer.Option(help="prompts after the first 12, which warm up")] = 100) -> None:
    """Gemma-3-270M with the starter pool, `auto` and the base model alone, 16 new tokens, one request at a time."""
    with tempfile.TemporaryDirectory() as name:
        rows = measure(Path(name), prompts)
    without_encoder = [row | {"auto first": row["auto first"] - row["encoder"]} for row in rows]
    table = Table(title=machine(), title_justify="left")
    for column in ("ms", "p50", "p90"):
        table.add_column(column, justify="left" if column == "ms" else "right")
    for what, source, column in (
        ("auto: to the first token, over engine and encoder", without_encoder, "auto first"),
        ("the encoder, a prompt it has not seen", rows, "encoder"),
        ("auto: whole stream, over the engine", rows, "auto whole"),
        ("base: to the first token, over the engine", rows, "base first"),
        ("base: whole stream, over the engine", rows, "base whole"),
        ("the engine, auto: to the first token", rows, "auto engine first"),
        ("the engine, auto: all 16 tokens", rows, "auto engine whole"),
    ):
        table.add_row(what, *(f"{value:.1f}" for value in quantiles(source, column)))
    with console.capture() as captured:
        console.print(table)
    console.print(table)
    figures = {
        "door_overhead_p50_ms": quantiles(without_encoder, "auto first")[0],
        "door_encoder_p50_ms": quantiles(rows, "encoder")[0],
        "door_whole_stream_overhead_p50_ms": quantiles(rows, "auto whole")[0],
    }
    write_results("door", figures=figures, table=captured.get(), runs=rows)


if __name__ == "__main__":
    typer.run(main)
