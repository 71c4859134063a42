"""Compare `loraretriever batch` with one engine alone, in rows per second: `python -m benchmarks.batch`.

Every round runs both once, so machine load is equal. The engine alone gets jobs with ready plans.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.results_file import machine, write_part
from deployments.batch.answering import PARTS_AT_ONCE
from deployments.batch.dataset import answer_parts, cluster
from deployments.batch.planning import PartPlanner
from deployments.batch.run import BatchRun, BatchSettings, begin, store_of
from gpu_worker.front.request.request import Job
from gpu_worker.model.base_model import load_base_model
from gpu_worker.native.loop import Engine
from lora_store import AdapterWeights, decode_weights
from tests.deployments.batching import TOPICS, prompts, publish, tiny_app, write_rows
from tests.gpu_worker.engine_driver import fetching
from tests.tiny import FAMILIES, InlineExecutor, byte_tokenizer, linear_shapes, tiny_config

console = Console(width=100)


def tiny_model(folder: Path) -> Path:
    """Save a random model, three layers of width 32, in a new folder."""
    torch.manual_seed(0)
    FAMILIES["gemma3"]().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def prepare(folder: Path, rows: int, max_tokens: int, part_rows: int) -> BatchSettings:
    """Write a store of six adapters, and an input with prompts of every kind."""
    model = tiny_model(folder / "model")
    config = tiny_app(model, str(folder / "pool"), max_batch_size=32)
    publish(config, linear_shapes(load_base_model(tiny_config(model))), folder / "adapters", TOPICS)
    source = write_rows(folder / "in.parquet", prompts(rows), group_rows=1000)
    defaults = {"max_tokens": max_tokens, "temperature": 0}
    return BatchSettings(config, str(source), str(folder / "planned"), part_rows, defaults=defaults)


class Alone:
    """One engine in this process. Plans are made before it starts; a first run loads the adapters."""

    def __init__(self, settings: BatchSettings) -> None:
        store = store_of(settings.config)

        def get(digest: str) -> AdapterWeights:
            return decode_weights(digest, store.load(digest))

        worker = replace(settings.config.worker_config(), max_waiting=3 * settings.part_rows)
        self._engine = Engine(worker, fetching(get, InlineExecutor()), executor=InlineExecutor())

    def run(self, parts: Sequence[Sequence[Job]]) -> float:
        """Return rows per second. Queue the next part before the queue is empty."""
        engine, num_queued = self._engine, 0
        started = time.perf_counter()
        while num_queued < len(parts) or engine.has_work:
            while num_queued < len(parts) and len(engine.waiting) <= len(parts[0]):
                for job in parts[num_queued]:
                    engine.submit(engine.prepare(job, lambda event: None))
                num_queued += 1
            engine.step()
        return sum(map(len, parts)) / (time.perf_counter() - started)


def batch(run: BatchRun) -> tuple[float, float]:
    """Return (rows per second after the first part, seconds until the first part: processes start, models load).

    Rows of the other parts in the engine at that moment are not counted, since they may be almost done. So the rate is
    a lower bound.
    """
    began, ends, num_errors = time.perf_counter(), [], 0
    for part in answer_parts(run, concurrency=1):
        ends.append(time.perf_counter())
        num_errors += part["num_errors"]
    if num_errors:
        raise SystemExit(f"{num_errors} rows have an error")
    num_rows = run.source.num_rows - PARTS_AT_ONCE * run.settings.part_rows
    return num_rows / (ends[-1] - ends[0]), ends[0] - began


def measure(folder: Path, rounds: int, rows: int, max_tokens: int, part_rows: int) -> list[dict[str, float]]:
    settings = prepare(folder, rows, max_tokens, part_rows)
    run = begin(settings)
    planner = PartPlanner(run)
    planned = [planner({"number": p.number, "start": p.start, "stop": p.stop})["planned"] for p in run.parts]
    jobs = [[asked.job for asked in part.asked if asked.job is not None] for part in planned]
    alone, found = Alone(settings), []
    alone.run(jobs[:2])
    with cluster(settings.config, None, 1):
        for number in range(rounds):
            by_engine = alone.run(jobs)
            by_batch, start_s = batch(begin(replace(settings, output_uri=str(folder / f"out-{number}"))))
            found.append({"engine rows/s": by_engine, "batch rows/s": by_batch, "start s": start_s})
            console.print(f"round {number + 1}: {found[-1]}")
    return found


def main(
    rounds: Annotated[int, typer.Option(help="each runs the engine, then the batch")] = 3,
    rows: Annotated[int, typer.Option(help="rows of the input")] = 10_000,
    max_tokens: Annotated[int, typer.Option(help="new tokens of most rows")] = 64,
    part_rows: Annotated[int, typer.Option(help="rows per part")] = 256,
) -> None:
    """Measure a tiny random model in float32 on one thread: six adapters of rank 4, all kinds of rows, batch 32."""
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), rounds, rows, max_tokens, part_rows)
    ratio = statistics.median(round_["batch rows/s"] / round_["engine rows/s"] for round_ in found)
    table = Table(title=f"{machine()}, {rows} rows", title_justify="left")
    for column in ("what", "rows/s", "/ engine"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for what, share in (("engine", 1.0), ("batch", ratio)):
        table.add_row(what, f"{statistics.median(round_[f'{what} rows/s'] for round_ in found):.0f}", f"{share:.2f}")
    with console.capture() as captured:
        console.print(table)
    console.print(table)
    figures = {"batch_rows_over_engine": ratio}
    write_part("cluster", "batch", figures=figures, table=captured.get(), runs=found)


if __name__ == "__main__":
    typer.run(main)
