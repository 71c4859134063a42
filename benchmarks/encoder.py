"""Measure the encoder alone and next to a decoding worker: `python -m benchmarks.encoder`.

A worker in a process of its own decodes 32 rows with a mixture of three adapters, on all cores and with the niceness of
the settings. The encoder has one thread, as in the server, and reads new texts of 40 tokens, in turn as the server runs
it (OpenVINO, in bfloat16 where the processor has it), with torch in bfloat16 and with torch in float32. The held-out
prompts of the starter pool show what that changes.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from typing import Annotated

import numpy as np
import typer

from benchmarks.engine_cases import NUM_NEW, Loaded, Quick, console, plans, shown, table_of
from benchmarks.results_file import write_results
from benchmarks.starter_pool import HELD_OUT, POOL, read_prompts
from gpu_worker.config import NativeSettings
from lora_store.sample_files import SAMPLES_FILE, parse_samples
from retriever_svc.bfloat16_linear import use_bfloat16
from retriever_svc.encoder import Encoder, unit_rows

NUM_TOKENS, NUM_BATCH, NUM_ADAPTERS, NUM_HELD_OUT = 40, 32, 8, 12
SERVER, BFLOAT16, FLOAT32 = "server", "bfloat16", "float32"
WORDS = ("river", "stone", "light", "paper", "green", "house", "door", "cold", "fish", "tree", "road", "night")


class Texts:
    """Draws texts of random words of one token each."""

    def __init__(self) -> None:
        self._draw = random.Random(0)

    def __call__(self, count: int) -> list[str]:
        return [" ".join(self._draw.choices(WORDS, k=NUM_TOKENS)) for _ in range(count)]


def decode_until(stop: Event, ready: Event) -> None:
    """Decode batches of 32 rows until `stop` is set. Runs in its own process."""
    os.nice(NativeSettings().niceness)
    loaded = Loaded(NUM_ADAPTERS, num_threads=os.cpu_count())
    asked = plans("mixture", NUM_ADAPTERS)
    prompts = loaded.prompts(0, len(asked))
    loaded.run(asked, prompts, 4)
    ready.set()
    while not stop.is_set():
        loaded.run(asked, prompts, NUM_NEW)


@contextmanager
def decoding_worker() -> Iterator[None]:
    """Run `decode_until` while the block runs."""
    context = multiprocessing.get_context("spawn")
    stop, ready = context.Event(), context.Event()
    process = context.Process(target=decode_until, args=(stop, ready))
    process.start()
    try:
        assert ready.wait(300), "the worker did not start within five minutes"
        yield
    finally:
        stop.set()
        process.join(120)


def milliseconds(encoders: Mapping[str, Encoder], texts: Texts, count: int, size: int = 1) -> dict[str, list[float]]:
    """Return each encoder's times for `size` new texts, taking turns."""
    found: dict[str, list[float]] = {name: [] for name in encoders}
    for encoder in encoders.values():
        encoder.encode(texts(size))
    for _ in range(count):
        for name, encoder in encoders.items():
            batch = texts(size)
            started = time.perf_counter()
            encoder.encode(batch)
            found[name].append(1000 * (time.perf_counter() - started))
    return found


def with_torch() -> Encoder:
    """Return the encoder with torch's bfloat16 products, as for models that OpenVINO cannot run."""
    encoder = Encoder(num_threads=1, dtype="float32")
    assert use_bfloat16(encoder._model, encoder._compute)
    return encoder


def found_first(encoders: Mapping[str, Encoder]) -> dict[str, float]:
    """Return the share of held-out prompts whose own adapter is first, in a pool embedded with float32."""
    folders = [path for path in sorted(POOL.iterdir()) if path.is_dir()]
    inputs = [[sample.input for sample in parse_samples((path / SAMPLES_FILE).read_bytes())] for path in folders]
    adapters = unit_rows(np.stack([encoders[FLOAT32].encode(own).mean(axis=0) for own in inputs]))
    prompts = read_prompts(HELD_OUT, NUM_HELD_OUT)
    own = np.array([[path.name for path in folders].index(prompt.task) for prompt in prompts])
    texts = [prompt.input for prompt in prompts]
    return {
        name: float(((encoder.encode(texts) @ adapters.T).argmax(axis=1) == own).mean())
        for name, encoder in encoders.items()
    }


def main(
    count: Annotated[int, typer.Option(help="texts of each kind, alone and next to a worker")] = 200,
    quick: Quick = False,
) -> None:
    """Measure the default encoder."""
    count = 3 if quick else count
    encoders = {
        SERVER: Encoder(num_threads=1),
        BFLOAT16: with_torch(),
        FLOAT32: Encoder(num_threads=1, dtype="float32"),
    }
    texts = Texts()
    alone = milliseconds(encoders, texts, count)
    batch = milliseconds(encoders, texts, max(count // 20, 1), NUM_BATCH)
    with decoding_worker():
        busy = milliseconds(encoders, texts, count)
    shares = found_first(encoders)
    table = table_of("runtime", "p50 alone ms", "p50 next to a worker ms", "p90 ms", "32 texts ms", "own adapter first")
    figures: dict[str, float] = {}
    for name in encoders:
        p50, p90 = statistics.median(busy[name]), float(np.quantile(busy[name], 0.9))
        cells = statistics.median(alone[name]), p50, p90, statistics.median(batch[name])
        table.add_row(name, *(f"{value:.1f}" for value in cells), f"{100 * shares[name]:.1f} %")
        figures[f"encoder_{name}_alone_p50_ms"], figures[f"encoder_{name}_next_to_worker_p50_ms"] = cells[:2]
        figures[f"encoder_{name}_own_adapter_first"] = shares[name]
    text = shown(table)
    if quick:
        console.print("a trial run: nothing is written")
        return
    write_results(
        "encoder",
        figures=figures,
        table=text,
        runs=[{"alone": alone, "busy": busy, "batch": batch}],
        keeps_other_processors=True,
    )


if __name__ == "__main__":
    typer.run(main)
