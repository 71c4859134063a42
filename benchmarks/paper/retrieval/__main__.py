"""The paper's retrieval experiments over the study's pool: `python -m benchmarks.paper.retrieval run`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.paper.choose import POOL_FILE, read_pool
from benchmarks.paper.retrieval.cells import Cells
from benchmarks.paper.retrieval.draws import draws_step
from benchmarks.paper.retrieval.extras import extra_steps, latency_step
from benchmarks.paper.retrieval.results import write_tables
from benchmarks.paper.retrieval.study import UNTRAINED, study_of
from benchmarks.paper.steps import run_steps, write_parquet
from benchmarks.paper.tasks import TaskList, load_parts, read_task_list
from benchmarks.paper.workspace import DEFAULT_ROOT, Workspace, fetch_archive
from benchmarks.results_file import RESULTS
from examples.bigbench_tasks import TaskSpec, read_task_files
from gpu_worker.config import WorkerConfig
from gpu_worker.model.base_model import model_source

KINDS = ("ranks", "draws", "samples", "bases", "growth", "latency")

cli = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
out = Console(soft_wrap=True)
Root = Annotated[Path, typer.Option(help="where encoders and raw rows are kept")]


@cli.command()
def run(root: Root = DEFAULT_ROOT) -> None:
    """Measure what is not measured yet, then write the tables. An interrupted run goes on where it was."""
    cells = cells_of(Workspace(root))
    pace = seconds_per_text(cells)
    run_steps([*cells.ranking_steps(), draws_step(cells)], pace, out)
    run_steps(extra_steps(cells, lambda: descriptions(Workspace(root), pool_specs(read_task_list()))), pace, out)
    run_steps([latency_step(cells)], pace, out)
    collect(cells, RESULTS)
    tables()


@cli.command()
def latency(root: Root = DEFAULT_ROOT) -> None:
    """Measure the latencies again, for when nothing else runs."""
    cells = cells_of(Workspace(root))
    step = latency_step(cells)
    step.path.unlink(missing_ok=True)
    run_steps([step], seconds_per_text(cells), out)
    collect(cells, RESULTS)


@cli.command()
def gather(root: Root = DEFAULT_ROOT) -> None:
    """Take what is measured by now for the tables, which say what is missing."""
    collect(cells_of(Workspace(root)), RESULTS)
    tables()


@cli.command()
def tables() -> None:
    """Write figures, tables and plots from the committed rows."""
    write_tables(RESULTS)


def cells_of(workspace: Workspace) -> Cells:
    """Over the fixed pool, or over the list where none is fixed yet."""
    listed = read_task_list()
    tokenizer = AutoTokenizer.from_pretrained(model_source(WorkerConfig()))
    parts = load_parts((*listed.tasks, *listed.spares), workspace, tokenizer)
    return Cells(study_of(listed, pool_specs(listed), parts), workspace)


def pool_specs(listed: TaskList) -> tuple[TaskSpec, ...]:
    return tuple(listed.by_name[name] for name in read_pool()) if POOL_FILE.exists() else listed.tasks


def seconds_per_text(cells: Cells) -> float:
    encoder = cells.encoder(UNTRAINED)
    texts = [text for task in cells.study.tasks for text in task.test[:2]]
    encoder.encode(texts[:8])
    started = time.monotonic()
    encoder.encode(texts[8:])
    return (time.monotonic() - started) / len(texts[8:])


def descriptions(workspace: Workspace, specs: tuple[TaskSpec, ...]) -> dict[str, str]:
    """What the source says of each task; siblings often share it."""
    files = read_task_files(fetch_archive(workspace), [spec.path for spec in specs])
    return {spec.name: files[spec.path]["description"] for spec in specs}


def collect(cells: Cells, folder: Path) -> None:
    """All rows of a kind in one file, those of this pool alone."""
    for kind in KINDS:
        parts = [pq.read_table(path) for path in sorted(cells.rows.glob(f"{kind}*.parquet"))]
        if parts:
            write_parquet(folder / f"paper_retrieval_{kind}.parquet", pa.concat_tables(parts).unify_dictionaries())


if __name__ == "__main__":
    cli()
