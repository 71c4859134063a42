"""Measure 32 streams next to another busy process: `python -m benchmarks.shared_cores`.

The streams decode in a process of their own, at nice 0, at the worker's default, and at that default under the nice
value 15 of Ray's workers; with the setting `shares_cores` and without it. The other process has two threads at nice 0
that hash without a pause. Without and with it take turns, and each rate is relative to those before and after it.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Annotated, Any

import typer

from benchmarks.engine_cases import NUM_ROWS, Loaded, Quick, console, plans, sampling, shown, table_of
from benchmarks.results_file import write_results
from deployments.config.app import WorkerSettings
from gpu_worker.front.request.request import Job

NUM_ADAPTERS, NUM_BUSY, MOST_NEW = 8, 2, 1500
_RAYS, _WORKERS = 15, WorkerSettings().niceness
NICENESS = {"equal": 0, "worker": _WORKERS, "ray": min(_RAYS + _WORKERS, 19)}
"""Nice value of the streams, by the name of its result."""
_SPAWN = multiprocessing.get_context("spawn")


def decode(niceness: int, shares_cores: bool, calls: Connection) -> None:
    """Decode until False arrives. Send the time and the number of tokens at each True. Runs in its own process."""
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
    is_running = True
    while is_running:
        calls.send((time.perf_counter(), counters.num_new_tokens))
        while not calls.poll():
            engine.step()
        is_running = calls.recv()


def hash_forever(is_busy: Event) -> None:
    """Keep two threads busy. Runs in its own process."""
    data = bytes(1 << 20)

    def work() -> None:
        while True:
            hashlib.sha256(data).digest()  # releases Python's lock

    for _ in range(NUM_BUSY):
        threading.Thread(target=work, daemon=True).start()
    is_busy.set()
    threading.Event().wait()


@contextmanager
def streams(
    niceness: int, shares_cores: bool, run: Callable[..., None] = decode
) -> Iterator[Callable[[], tuple[float, int]]]:
    """Decode with `run` while the block runs. Yield a function that returns the time and the tokens so far."""
    calls, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=run, args=(niceness, shares_cores, theirs))
    process.start()
    theirs.close()  # so that `recv` fails where the process has died

    def count() -> tuple[float, int]:
        calls.send(True)
        found: tuple[float, int] = calls.recv()
        return found

    try:
        calls.recv()
        yield count
    finally:
        with suppress(BrokenPipeError):  # it has died
            calls.send(False)
        process.join(120)


@contextmanager
def busy_process() -> Iterator[None]:
    """Run `hash_forever` while the block runs."""
    is_busy = _SPAWN.Event()
    process = _SPAWN.Process(target=hash_forever, args=(is_busy,), daemon=True)
    process.start()
    try:
        assert is_busy.wait(60), "the other process does not start"
        yield
    finally:
        process.kill()
        process.join()


def rate(count: Callable[[], tuple[float, int]], seconds: float) -> float:
    """Return the tokens per second of the steps in about this time."""
    began, before = count()
    time.sleep(seconds)
    ended, after = count()
    return (after - before) / (ended - began)


def ratios(
    count: Callable[[], tuple[float, int]], rounds: int, seconds: float, busy: Callable[[], Any] = busy_process
) -> list[float]:
    """Return each round's rate next to the busy process over the mean of those before and after it.

    The streams decode all the time. The shared rate includes the first steps next to that process.
    """
    found, before = [], rate(count, seconds / 4)
    for _ in range(rounds):
        with busy():
            shared = rate(count, seconds)
        time.sleep(min(1.0, seconds))  # in which all threads come back
        after = rate(count, seconds / 4)
        found.append(2 * shared / (before + after))
        console.print(f"{before:.0f} tokens/s alone, {shared:.1f} shared, {after:.0f} alone: {found[-1]:.2f}")
        before = after
    return found


def main(
    rounds: Annotated[int, typer.Option(help="rounds for each nice value")] = 3,
    seconds: Annotated[float, typer.Option(help="next to the busy process; a quarter of it alone")] = 20,
    only: Annotated[str, typer.Option(help="equal, worker or ray; writes nothing")] = "",
    quick: Quick = False,
) -> None:
    """Gemma-3-270M bfloat16, mixtures of 3 over 8 adapters."""
    table = table_of("nice value of the streams", "threads", "rounds", "median", "least", "most")
    figures, runs = {}, []
    for name, niceness in NICENESS.items():
        for shares_cores in (True, False) if only in ("", name) else ():
            if name == "ray" and not shares_cores:  # a step takes a minute
                continue
            console.print(f"nice {niceness}, {'threads as cores are free' if shares_cores else 'all threads'}:")
            with streams(niceness, shares_cores) as count:
                found = ratios(count, 1 if quick else rounds, 1 if quick else seconds)
            figures[f"shared_over_alone_{name}{'' if shares_cores else '_all_threads'}"] = statistics.median(found)
            runs.append({"niceness": niceness, "shares_cores": shares_cores, "ratios": found})
            cells = (statistics.median(found), min(found), max(found))
            threads = "as cores are free" if shares_cores else "all"
            table.add_row(f"{niceness} ({name})", threads, str(len(found)), *(f"{value:.2f}" for value in cells))
    text = shown(table)
    if not (quick or only):
        write_results("shared_cores", figures=figures, table=text, runs=runs, keeps_other_vendors=True)


if __name__ == "__main__":
    typer.run(main)
