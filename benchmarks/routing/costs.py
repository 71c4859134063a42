"""Measure what the projection and the thresholds cost: `python -m benchmarks.routing.costs`. Use an idle machine.

- One prompt's search, and its whole choice without the encoder, in a pool of 100,000 adapters.
- A publish until the adapter answers, over HTTP, with two Retrievers and two workers.
- A refit of the projection for 100,000 adapters with 20 samples each, encoding included.

Each but the last is measured with the projection and without it, in turns.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.pool_scale import SIBLING_COSINE, TOP_K, Data, Rebuilds, Source, seconds_of
from benchmarks.publish import publish_singles
from benchmarks.results_file import machine, write_results
from lora_store.adapter import Sample
from lora_store.records import AdapterRecord
from retriever_svc import Encoder, LivePool, ProjectionFiles, Retriever, RouteRequest
from retriever_svc.reindex import refit
from retriever_svc.retriever import Encoded

NUM_ADAPTERS, NUM_SAMPLES = 100_000, 20
_TURNS = 5
out = Console(width=100)


def pools_of(records: Sequence[AdapterRecord], encoder: Encoder, projections: ProjectionFiles | None) -> LivePool:
    """Return a pool of these records with its index trained. `projections`: also for the ordinary prompts."""
    rebuilds = Rebuilds()
    pools = LivePool(lambda _: encoder, Source(records), projections=projections, background=rebuilds)
    rebuilds.run()
    return pools


def projected(records: Sequence[AdapterRecord], encoder: Encoder) -> list[AdapterRecord]:
    """Return the records with projected vectors."""
    assert encoder.projection is not None
    embeddings = [record.embedding for record in records if record.embedding is not None]
    vectors = encoder.projection.project(np.stack([embedding.vector for embedding in embeddings]))
    pairs = zip(records, embeddings, vectors, strict=True)
    return [
        replace(record, embedding=replace(embedding, encoder=encoder.identity, vector=vector))
        for record, embedding, vector in pairs
    ]


def search_times(pools: LivePool, queries: np.ndarray) -> dict[str, list[float]]:
    """Return the seconds of each query (N, D): its search, and its search, judgement and plan."""
    pool, retriever, request = pools.current, Retriever(pools), RouteRequest("")
    pool.nearest(queries[:1], TOP_K, "local")
    retriever.route_encoded([request], [Encoded(pool, queries[0])])
    return {
        "search": [seconds_of(lambda q=q: pool.nearest(q[np.newaxis], TOP_K, "local")) for q in queries],
        "choice": [seconds_of(lambda q=q: retriever.route_encoded([request], [Encoded(pool, q)])) for q in queries],
    }


def measure_search(data: Data, count: int, num_queries: int) -> dict[str, float]:
    """Return medians in milliseconds, with the projection and without it."""
    plain = data.encoder
    files = ProjectionFiles()
    whitened = plain.projected(files.shipped(plain.identity))
    assert whitened.projection is not None
    records, queries = data.records(count, SIBLING_COSINE), data.queries(num_queries)
    pools = {
        "plain": (pools_of(records, plain, None), queries),
        "projected": (pools_of(projected(records, whitened), whitened, files), whitened.projection.project(queries)),
    }
    times: dict[str, list[float]] = {}
    for part in np.array_split(np.arange(num_queries), _TURNS):  # in turns, so that both see the same machine
        for kind, (live, rows) in pools.items():
            for name, seconds in search_times(live, rows[part]).items():
                times.setdefault(f"{name}_{kind}_ms", []).extend(seconds)
    project = whitened.projection.project
    times["project_ms"] = [seconds_of(lambda q=q: project(q[np.newaxis])) for q in queries]
    return {name: statistics.median(seconds) * 1e3 for name, seconds in times.items()}


def measure_publish(rounds: int) -> dict[str, float]:
    """Return the median seconds from an upload to its answer, with the projection and without it."""
    medians = {}
    for kind, projection in (("plain", "none"), ("projected", "auto")):
        with tempfile.TemporaryDirectory() as name:
            singles = publish_singles(Path(name), rounds, projection)
        medians[f"publish_to_answer_{kind}_s"] = statistics.median(answered for _, answered in singles)
    return medians


def measure_refit(data: Data, count: int, num_samples: int) -> dict[str, float]:
    """Return the seconds of a refit for a pool of this size. Each adapter has texts of its own."""
    snapshot = Source(data.records(count, SIBLING_COSINE))()
    files = ProjectionFiles()
    read: list[str] = []

    def samples(record: AdapterRecord) -> list[Sample]:
        read.append(record.ref.name)
        return [Sample(f"Task of {record.ref.name}: say what follows from case {n}.") for n in range(num_samples)]

    started = time.perf_counter()
    refit(snapshot, data.encoder, samples, files.shipped(data.encoder.identity))
    return {"refit_s": time.perf_counter() - started, "refit_adapters_read": float(len(read))}


def ratios(figures: dict[str, float]) -> dict[str, float]:
    """Return each measure with the projection, relative to that without it."""
    pairs = {name: name.replace("_projected_", "_plain_") for name in figures if "_projected_" in name}
    return {f"{name.partition('_projected_')[0]}_ratio": figures[name] / figures[pairs[name]] for name in pairs}


def main(
    quick: Annotated[bool, typer.Option(help="a small pool and no server; write nothing")] = False,
    rounds: Annotated[int, typer.Option(help="publishes with the projection, and as many without it")] = 15,
) -> None:
    """Measure, print the table and write results/routing_costs unless `--quick`."""
    data, count = Data.load(), 5_000 if quick else NUM_ADAPTERS
    work: list[Callable[[], dict[str, float]]] = [
        lambda: measure_search(data, count, 100 if quick else 1000),
        lambda: measure_refit(data, 100 if quick else count, NUM_SAMPLES),
        *([] if quick else [lambda: measure_publish(rounds)]),
    ]
    figures: dict[str, float] = {}
    for step in work:
        figures |= step()
    figures |= ratios(figures)
    table = Table("measure", "value", title=machine(), title_justify="left")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:.3f}")
    with out.capture() as captured:
        out.print(table)
    out.print(table)
    if not quick:
        runs: list[dict[str, Any]] = [{"adapters": count, **figures}]
        write_results("routing_costs", figures=figures, table=captured.get(), runs=runs)


if __name__ == "__main__":
    typer.run(main)
