"""Measure 32 streams next to another busy process: `python -m benchmarks.shared_cores`.

The streams decode in a process of their own, at nice 0, at the worker's default, and at that default under the nice
value 15 of Ray's workers; each with `shares_cores` and, in the same rounds, always on all cores. The other process has
two threads at nice 0 that hash without a pause. Without and with it take turns, and each rate is relative to those
before and after it.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Annotated

import typer

from benchmarks.engine_cases import NUM_ROWS, Loaded, Quick, console, plans, sampling, shown, table_of
from benchmarks.results_file import write_results
from deployments.config.app import WorkerSettings
from gpu_worker.request.request import Job

NUM_ADAPTERS, NUM_BUSY, MOST_NEW = 8, 2, 1500
_RAYS, _WORKERS = 15, WorkerSettings().niceness
NICENESS = {"equal": 0, "worker": _WORKERS, "ray": min(_RAYS + _WORKERS, 19)}
"""Nice value of the streams, by the name of its result."""
_SPAWN = multiprocessing.get_context("spawn")


def decode(niceness: int, shares_cores: bool, calls: Connection) -> None:
    """Decode for each number of seconds that arrives, and send the tokens per second. Runs in its own process."""
    os.nice(niceness)
    loaded = Loaded(NUM_ADAPTERS, num_threads=os.cpu_count(), shares_cores=shares_cores)
    engine, counters = loaded.engine, loaded.engine.counters
    for number, (plan, prompt) in enumerate(
        zip(plans("mixture", NUM_ADAPTERS), loaded.prompts(0, NUM_ROWS), strict=True)
    ):
        job = Job(str(number), prompt.text, plan, sampling(MOST_NEW))
        engine.submit(engine.prepare(job, lambda _: None))
    while counters.num_new_tokens < 2 * NUM_ROWS:
        engine.step()
    calls.send(0.0)
    while seconds := calls.recv():
        started, before = time.perf_counter(), counters.num_new_tokens
        while time.perf_counter() < started + seconds:
            engine.step()
        calls.send((counters.num_new_tokens - before) / (time.perf_counter() - started))


def hash_forever() -> None:
    """Keep two threads busy. Runs in its own process."""
    data = bytes(1 << 20)

    def work() -> None:
        while True:
            hashlib.sha256(data).digest()  # releases Python's lock

    for _ in range(NUM_BUSY):
        threading.Thread(target=work, daemon=True).start()
    threading.Event().wait()


@contextmanager
def streams(niceness: int, shares_cores: bool, run: Callable[..., None] = decode) -> Iterator[Callable[[float], float]]:
    """Yield a function that decodes for some seconds, with `run`, and returns the tokens per second."""
    calls, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=run, args=(niceness, shares_cores, theirs))
    process.start()
    theirs.close()  # so that `recv` fails where the process has died

    def rate(seconds: float) -> float:
        calls.send(seconds)
        return float(calls.recv())

    try:
        calls.recv()
        yield rate
    finally:
        with suppress(BrokenPipeError):  # it has died
            calls.send(0)
        process.join(120)


@contextmanager
def busy_process() -> Iterator[None]:
    """Run `hash_forever` while the block runs."""
    process = _SPAWN.Process(target=hash_forever, daemon=True)
    process.start()
    try:
        time.sleep(1)  # until it hashes
        yield
    finally:
        process.kill()
        process.join()


def ratios(rates: Sequence[Callable[[float], float]], rounds: int, seconds: float) -> list[list[float]]:
    """Return, for each way to decode, each round's rate next to the busy process over the mean of those around it."""
    found: list[list[float]] = [[] for _ in rates]
    before = [rate(seconds) for rate in rates]
    for _ in range(rounds):
        with busy_process():
            shared = [rate(seconds) for rate in rates]
        after = [rate(seconds) for rate in rates]
        for of_way, low, *around in zip(found, shared, before, after, strict=True):
            of_way.append(low / statistics.mean(around))
            console.print(f"{around[0]:.0f} tokens/s alone, {low:.0f} shared, {around[1]:.0f} alone: {of_way[-1]:.2f}")
        before = after
    return found


def main(
    rounds: Annotated[int, typer.Option(help="rounds for each nice value")] = 3,
    seconds: Annotated[float, typer.Option(help="of each measurement")] = 5,
    only: Annotated[str, typer.Option(help="equal, worker or ray; writes nothing")] = "",
    quick: Quick = False,
) -> None:
    """Gemma-3-270M bfloat16, mixtures of 3 over 8 adapters."""
    table = table_of("nice value of the streams", "threads", "rounds", "median", "least", "most")
    figures, runs = {}, []
    for name, niceness in NICENESS.items():
        if only not in ("", name):
            continue
        console.print(f"nice {niceness}:")
        with streams(niceness, True) as adapting, streams(niceness, False) as fixed:
            both = ratios([adapting, fixed], 1 if quick else rounds, 1 if quick else seconds)
        for suffix, threads, found in zip(("", "_all_threads"), ("as the cores allow", "all"), both, strict=True):
            figures[f"shared_over_alone_{name}{suffix}"] = statistics.median(found)
            runs.append({"niceness": niceness, "threads": threads, "ratios": found})
            cells = (statistics.median(found), min(found), max(found))
            table.add_row(f"{niceness} ({name})", threads, str(len(found)), *(f"{value:.2f}" for value in cells))
    text = shown(table)
    if not (quick or only):
        write_results("shared_cores", figures=figures, table=text, runs=runs)


if __name__ == "__main__":
    typer.run(main)
