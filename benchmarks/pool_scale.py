"""Measure search, recall, publish, start-up and memory from a hundred to a million adapters.

Adapters are drawn around the starter pool's real sample embeddings, queries around its held-out prompts.
"""

from __future__ import annotations

import hashlib
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.results_file import RESULTS, write_results
from benchmarks.starter_pool import HELD_OUT, POOL
from lora_store.adapter import LOCAL_TENANT, AdapterRef
from lora_store.catalogue import Catalogue
from lora_store.events import Publish
from lora_store.files import Files
from lora_store.location import Location
from lora_store.records import AdapterRecord, Embedding
from lora_store.snapshot import Snapshot
from retriever_svc import Encoder, LivePool, SavedIndexes
from retriever_svc.encoder import unit_rows
from retriever_svc.encoder_files import ENGLISH_MODEL
from retriever_svc.index import Match
from retriever_svc.pool import Pool

try:
    from matplotlib import pyplot
except ImportError:  # the optional extra `bench` is not installed
    pyplot = None

SIBLING_COSINE = 0.86  # cosine of two adapters around one sample, as of the starter pool's two nearest tasks
QUERY_COSINE = 0.99  # cosine of a query to its held-out prompt
OWN_SCORES = 20  # per adapter
SMALL_TENANT, NUM_SMALL = "small", 5
TAGS = {"half": 0.5, "tenth": 0.1, "hundredth": 0.01}
TOP_K = 3
TOLERANCE = 1e-3  # a hit may score this much below the third best
SIDE_ROWS = 2500  # half of the rows that may be missing from the lists

out = Console(width=160)


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a search: one that sees everything, one that filters by tag, or a tenant with five adapters."""

    name: str
    tenant: str = LOCAL_TENANT
    tags: tuple[str, ...] = ()


CALLERS = (Caller("all"), *[Caller(tag, tags=(tag,)) for tag in TAGS], Caller("five", SMALL_TENANT, ("own",)))


@dataclass(frozen=True, slots=True)
class Data:
    """The encoder, and the centres around which adapters and queries are drawn."""

    encoder: Encoder
    samples: np.ndarray
    prompts: np.ndarray

    @classmethod
    def load(cls) -> Data:
        encoder = Encoder(ENGLISH_MODEL)
        return cls(
            encoder,
            encoder.encode(_texts(sorted(POOL.glob("*/lora_samples.jsonl")))),
            encoder.encode(_texts(sorted(HELD_OUT.glob("*.jsonl")))),
        )

    def records(self, count: int, sibling_cosine: float) -> list[AdapterRecord]:
        rng = np.random.default_rng(count)
        vectors = jittered(self.samples, count, sibling_cosine, rng)
        scores = rng.uniform(0.3, 0.95, (count, OWN_SCORES)).astype(np.float32)
        marks = rng.random((count, len(TAGS))) < list(TAGS.values())
        records = []
        for number in range(count):
            tags = tuple(tag for tag, has in zip(TAGS, marks[number], strict=True) if has)
            embedding = Embedding(self.encoder.identity, vectors[number], scores[number])
            records.append(record_of(f"adapter-{number}", embedding, tags))
        for number in range(0, count, max(1, count // NUM_SMALL))[:NUM_SMALL]:
            ref = replace(records[number].ref, tenant=SMALL_TENANT)
            records[number] = replace(records[number], ref=ref, tags=("own",), visibility="private")
        return records

    def queries(self, count: int) -> np.ndarray:
        return jittered(self.prompts, count, QUERY_COSINE**2, np.random.default_rng(1))


def _texts(files: Sequence[Path]) -> list[str]:
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [json.loads(line)["input"] for line in lines]


def jittered(centres: np.ndarray, count: int, sibling_cosine: float, rng: np.random.Generator) -> np.ndarray:
    """Return unit rows around randomly chosen centres. Two rows around one centre have about this cosine."""
    dim = centres.shape[1]
    noise = (1 / sibling_cosine - 1) ** 0.5 / dim**0.5
    rows = np.empty((count, dim), np.float32)
    for start in range(0, count, 50_000):
        block = rows[start : start + 50_000]
        block[:] = centres[rng.integers(0, len(centres), len(block))]
        block += noise * rng.standard_normal(block.shape, dtype=np.float32)
        block[:] = unit_rows(block)
    return rows


def record_of(name: str, embedding: Embedding, tags: tuple[str, ...]) -> AdapterRecord:
    digest = hashlib.sha256(name.encode()).hexdigest()
    return AdapterRecord(
        ref=AdapterRef(LOCAL_TENANT, name, digest),
        weights_digest=digest,
        samples_digest=digest,
        visibility="public",
        tags=tags,
        base_model="base",
        ranks=(8,),
        target_modules=("q_proj", "v_proj"),
        num_bytes=1 << 20,
        num_samples=OWN_SCORES,
        template=None,
        embedding=embedding,
        probe_shift=0.5,
        source="benchmark",
        actor="benchmark",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        generation=1,
    )


class Source:
    """A catalogue in memory."""

    def __init__(self, records: Sequence[AdapterRecord]) -> None:
        self.now = Snapshot(1, {(r.ref.tenant, r.ref.name): r for r in records})

    def __call__(self) -> Snapshot:
        return self.now

    def change(self, new: Sequence[AdapterRecord] = (), gone: Sequence[AdapterRecord] = ()) -> None:
        records = dict(self.now.records) | {(r.ref.tenant, r.ref.name): r for r in new}
        for record in gone:
            del records[record.ref.tenant, record.ref.name]
        self.now = Snapshot(self.now.generation + 1, records)


@dataclass
class Rebuilds:
    """Runs index rebuilds at once and times them, after the call that requested them."""

    seconds: float = 0.0
    waiting: list[Callable[[], None]] | None = None

    def __call__(self, work: Callable[[], None]) -> None:
        self.waiting = [*(self.waiting or []), work]

    def run(self) -> None:
        started = time.perf_counter()
        while self.waiting:
            self.waiting.pop(0)()
        self.seconds = time.perf_counter() - started


def seconds_of(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure_size(data: Data, count: int, num_queries: int, sibling_cosine: float) -> dict[str, Any]:
    """Measure one row of the table. If there are lists, half of the allowed rows are missing from them."""
    records = data.records(count, sibling_cosine)
    side = SIDE_ROWS if count > 50_000 else 0
    source, rebuilds = Source(records[: count - side]), Rebuilds()
    started = time.perf_counter()
    pools = LivePool(lambda model: data.encoder, source, background=rebuilds)
    build_s = time.perf_counter() - started
    rebuilds.run()
    if side:
        source.change(records[-side:])
        pools.catch_up()
    row = {"adapters": count, "build_s": build_s, "train_s": rebuilds.seconds}
    row |= {"callers": measure_callers(pools.current, data.queries(num_queries))}
    row |= measure_changes(pools, source, data)
    stats = pools.stats()
    row |= {"side_rows": stats.num_unlisted if stats.has_lists else 0, "lists": stats.has_lists}
    row |= {"index_mib": stats.num_bytes / 2**20, "peak_rss_mib": peak_rss_mib()}
    return row


def peak_rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_callers(pool: Pool, queries: np.ndarray) -> dict[str, dict[str, float]]:
    measured = {}
    for caller in CALLERS:
        if pool.allowed(caller.tenant, caller.tags).num == 0:  # computed once per generation and reported as first_ms
            continue
        times, found = [], []
        for query in queries:
            started = time.perf_counter()
            [matches] = pool.nearest(query[np.newaxis], TOP_K, caller.tenant, caller.tags)
            times.append(time.perf_counter() - started)
            found.append([match.score for match in matches])
        p50, p99 = np.percentile(times, [50, 99]) * 1e3
        measured[caller.name] = {"p50_ms": p50, "p99_ms": p99, "recall_at_3": recall(pool, caller, queries, found)}
    return measured


def recall(pool: Pool, caller: Caller, queries: np.ndarray, found: Sequence[Sequence[float]]) -> float:
    """Return the share of expected adapters found: exact score within TOLERANCE of the third best, or above it."""
    records = [r for r in pool.index.records if r.is_visible_to(caller.tenant) and set(caller.tags) <= set(r.tags)]
    vectors = np.stack([record.embedding.vector for record in records if record.embedding is not None])
    wanted, hits = min(TOP_K, len(records)), 0
    for start in range(0, len(queries), 20):
        exact = queries[start : start + 20] @ vectors.T
        last = np.partition(exact, -wanted, axis=1)[:, -wanted]
        for scores, least in zip(found[start : start + 20], last, strict=True):
            hits += sum(score >= least - TOLERANCE for score in scores)
    return hits / (wanted * len(queries))


def measure_changes(pools: LivePool, source: Source, data: Data) -> dict[str, float]:
    """Return medians without the catalogue's work: a publish, a withdrawal, and the first search of a generation."""
    times: dict[str, list[float]] = {"add_ms": [], "remove_ms": [], "first_ms": []}
    [query] = data.queries(1)
    for number in range(15):
        record = record_of(f"new-{number}", Embedding(data.encoder.identity, query, query[:OWN_SCORES]), ())
        for name, change in (("add_ms", {"new": [record]}), ("remove_ms", {"gone": [record]})):
            source.change(**change)
            times[name].append(seconds_of(pools.catch_up))
            times["first_ms"].append(seconds_of(partial(search, pools.current, query[np.newaxis])))
    return {name: float(np.median(values)) * 1e3 for name, values in times.items()}


def search(pool: Pool, queries: NDArray[np.float32]) -> list[list[Match]]:
    """Return the nearest adapters of queries (N, D), judged as for requests."""
    return pool.judged(pool.nearest(queries, TOP_K, "t"), "balanced", queries)


def measure_startup(data: Data, count: int) -> dict[str, Any]:
    """Measure a start from a table on disk: catalogue, encoder and index, until requests can be answered."""
    with tempfile.TemporaryDirectory() as folder:
        location = Location(folder)
        catalogue = Catalogue(location.child("catalogue"))
        records = data.records(count, SIBLING_COSINE)
        for start in range(0, count, 1000):
            events = [Publish(record) for record in records[start : start + 1000]]
            catalogue.commit(lambda snapshot, events=events: events)
        del catalogue, records
        absent_s, rebuilds = start_up(location)
        rebuilds.run()
        present_s, _ = start_up(location)
    return {"adapters": count, "startup_s": absent_s, "train_s": rebuilds.seconds, "startup_saved_index_s": present_s}


def start_up(location: Location) -> tuple[float, Rebuilds]:
    rebuilds = Rebuilds()
    saved = SavedIndexes(Files(location.child("index")))
    started = time.perf_counter()
    catalogue = Catalogue(location.child("catalogue"))
    pools = LivePool(Encoder, catalogue.snapshot, saved=saved, background=rebuilds)
    seconds = time.perf_counter() - started
    assert pools.stats().num_live == len(pools.current.snapshot.records)
    assert pools.stats().has_lists == (rebuilds.waiting is None)
    return seconds, rebuilds


def tables(rows: Sequence[dict[str, Any]], startup: dict[str, Any]) -> Iterator[Table]:
    table = Table("adapters", "lists", "caller", "p50 ms", "p99 ms", "recall@3", title="a search for one prompt, k = 3")
    for row in rows:
        for name, found in row["callers"].items():
            cells = (f"{found['p50_ms']:.3f}", f"{found['p99_ms']:.3f}", f"{found['recall_at_3']:.4f}")
            table.add_row(f"{row['adapters']:,}", f"+ {row['side_rows']:,}" if row["lists"] else "exact", name, *cells)
        table.add_section()
    yield table
    columns = ("add_ms", "remove_ms", "first_ms", "build_s", "train_s", "index_mib", "peak_rss_mib")
    table = Table("adapters", *[column.replace("_", " ") for column in columns], title="a generation, and everything")
    for row in rows:
        table.add_row(f"{row['adapters']:,}", *[f"{row[column]:,.2f}" for column in columns])
    yield table
    table = Table(
        *[name.replace("_", " ") for name in startup], title="start-up from a table on disk, encoder included"
    )
    table.add_row(*[f"{value:,.2f}" for value in startup.values()])
    yield table


def figures_of(rows: Sequence[dict[str, Any]], startup: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of the slowest filter, and of the caller with the lowest recall."""
    figures = {}
    for row in rows:
        exponent = round(np.log10(row["adapters"]))
        if exponent >= 4:
            slowest = max(found["p50_ms"] for name, found in row["callers"].items() if name != "all")
            figures[f"search_p50_ms_1e{exponent}"] = round(slowest, 3)
        if exponent >= 5:
            lowest = min(found["recall_at_3"] for found in row["callers"].values())
            figures[f"recall_at_3_1e{exponent}"] = round(lowest, 4)
    exponent = round(np.log10(startup["adapters"]))
    slower = max(startup["startup_s"], startup["startup_saved_index_s"])
    return figures | {f"startup_s_1e{exponent}": round(slower, 2)}


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    assert pyplot is not None
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    sizes = [row["adapters"] for row in rows]
    for caller in CALLERS:
        for percentile, style in (("p50_ms", "-o"), ("p99_ms", ":")):
            times = [row["callers"].get(caller.name, {}).get(percentile) for row in rows]
            label = caller.name if percentile == "p50_ms" else None
            axes.loglog(sizes, times, style, label=label, color=f"C{CALLERS.index(caller)}")
    axes.set(xlabel="adapters in the pool", ylabel="search, ms (line: p50, dots: p99)")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(title="may use")
    figure.savefig(path)
    pyplot.close(figure)


def main(
    quick: Annotated[bool, typer.Option(help="small pools; write nothing")] = False,
    largest: Annotated[int, typer.Option(help="exponent of the largest pool")] = 6,
    sibling_cosine: Annotated[float, typer.Option(help="cosine of two adapters of one kind")] = SIBLING_COSINE,
) -> None:
    """Measure, print the tables, and write benchmarks/results/pool_scale/ unless `--quick`."""
    data = Data.load()
    sizes = [10**exponent for exponent in range(2, (4 if quick else largest) + 1)]
    rows = []
    for size in sizes:
        rows.append(measure_size(data, size, 100 if quick else 1000, sibling_cosine))
        out.print(f"{size:,} adapters: {json.dumps(rows[-1])}", markup=False, highlight=False, soft_wrap=True)
    startup = measure_startup(data, 30_000 if quick else 100_000)
    with out.capture() as captured:
        out.print(*tables(rows, startup), sep="\n")
    out.print(captured.get(), markup=False, highlight=False)
    if quick:
        return
    write_results("pool_scale", figures=figures_of(rows, startup), table=captured.get(), runs=[*rows, startup])
    if pyplot is not None:
        plot(rows, RESULTS / "pool_scale" / "plot.svg")


if __name__ == "__main__":
    typer.run(main)
