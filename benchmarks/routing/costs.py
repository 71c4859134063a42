"""Measure what the projection and the thresholds cost: `python -m benchmarks.routing.costs`. Use an idle machine.

- One prompt's search, and its whole choice without the encoder, in a pool of 100,000 adapters.
- A refit of the projection for 100,000 adapters with 20 samples each, encoding included.
- A publish until the adapter answers, over HTTP, with two Retrievers and two workers.

Searches are measured in turns, with the projection and without it. With `--older` an older source tree, a checkout with
its virtual environment, is measured in the same run, and the ratios are to that tree. About six minutes.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
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
from benchmarks.routing.older_tree import OlderTree
from lora_store.adapter import Sample
from lora_store.records import AdapterRecord
from retriever_svc import Encoder, LivePool, ProjectionFiles, Retriever, RouteRequest
from retriever_svc.reindex import refit
from retriever_svc.retriever import Encoded

NUM_ADAPTERS, NUM_SAMPLES, NUM_QUERIES = 100_000, 20, 1000
_TURNS = 5
Measure = Callable[[int, int], dict[str, list[float]]]
"""Return the seconds of the queries from the first number to the second."""
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


def measure_search(data: Data, count: int, num_queries: int, older: Path | None = None) -> dict[str, float]:
    """Return medians in milliseconds: with the projection, without it, and of the `older` tree if there is one."""
    plain, files = data.encoder, ProjectionFiles()
    whitened = plain.projected(files.shipped(plain.identity))
    assert whitened.projection is not None
    records, queries = data.records(count, SIBLING_COSINE), data.queries(num_queries)
    rows = whitened.projection.project(queries)
    live = pools_of(records, plain, None), pools_of(projected(records, whitened), whitened, files)
    times: dict[str, list[float]] = {}
    with ExitStack() as stack:
        kinds: dict[str, Measure] = {
            "plain": lambda start, stop: search_times(live[0], queries[start:stop]),
            "projected": lambda start, stop: search_times(live[1], rows[start:stop]),
        }
        if older is not None:
            tree = stack.enter_context(OlderTree(older, "search", str(count), str(num_queries)))
            tree.result()  # its pool is built
            kinds["older"] = lambda start, stop: {"search": tree.result(f"{start} {stop}")}
        for part in np.array_split(np.arange(num_queries), _TURNS):  # in turns, so that all see the same machine
            for kind, measure in kinds.items():
                for name, seconds in measure(int(part[0]), int(part[-1]) + 1).items():
                    times.setdefault(f"{name}_{kind}_ms", []).extend(seconds)
    project = whitened.projection.project
    times["project_ms"] = [seconds_of(lambda q=q: project(q[np.newaxis])) for q in queries]
    return {name: statistics.median(seconds) * 1e3 for name, seconds in times.items()}


def measure_publish(rounds: int, older: Path | None) -> dict[str, float]:
    """Return the median seconds from an upload to its answer: with the projection, and of the older tree or without."""
    medians = {}
    if older is None:
        medians["publish_to_answer_plain_s"] = _median_publish(rounds, "none")
    else:
        with OlderTree(older, "publish", str(rounds)) as tree:
            medians["publish_to_answer_older_s"] = statistics.median(tree.result())
    return medians | {"publish_to_answer_projected_s": _median_publish(rounds, "auto")}


def _median_publish(rounds: int, projection: str) -> float:
    with tempfile.TemporaryDirectory() as name:
        return statistics.median(answered for _, answered in publish_singles(Path(name), rounds, projection))


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
    """Return each measure with the projection, relative to that without it and to that of the older tree."""
    found = {}
    for name in [name for name in figures if "_projected_" in name]:
        for other in ("plain", "older"):
            base = figures.get(name.replace("_projected_", f"_{other}_"))
            if base is not None:
                found[f"{name.partition('_projected_')[0]}_over_{other}"] = figures[name] / base
    return found


def main(
    quick: Annotated[bool, typer.Option(help="a small pool and no server; write nothing")] = False,
    rounds: Annotated[int, typer.Option(help="publishes of each kind")] = 15,
    older: Annotated[Path | None, typer.Option(help="a checkout of an older commit with its .venv")] = None,
) -> None:
    """Measure, print the table and write results/routing_costs unless `--quick`."""
    data, count = Data.load(), 5_000 if quick else NUM_ADAPTERS
    work: list[Callable[[], dict[str, float]]] = [
        lambda: measure_search(data, count, 100 if quick else NUM_QUERIES, older),
        lambda: measure_refit(data, 100 if quick else count, NUM_SAMPLES),
        *([] if quick else [lambda: measure_publish(rounds, older)]),
    ]
    figures: dict[str, float] = {}
    for step in work:
        figures |= step()
        out.print(figures)
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
