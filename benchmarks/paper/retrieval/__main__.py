"""Run the paper's retrieval experiments over the study's pool: `python -m benchmarks.paper.retrieval run`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console

from benchmarks.paper.common.resumable import Step, run_steps, write_parquet
from benchmarks.paper.common.tasks import read_task_list
from benchmarks.paper.common.workspace import DEFAULT_ROOT, PAPER_RESULTS, Workspace
from benchmarks.paper.retrieval import projected
from benchmarks.paper.retrieval.draws import draws_step
from benchmarks.paper.retrieval.experiments import Experiments
from benchmarks.paper.retrieval.loading import load_experiments
from benchmarks.paper.retrieval.results import write_tables
from benchmarks.paper.retrieval.study import UNTRAINED
from benchmarks.results_file import TreeChanged, change_suffix

KINDS = ("ranks", "draws", projected.KIND)

cli = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
out = Console(soft_wrap=True)
Root = Annotated[Path, typer.Option(help="the folder of encoders and raw rows")]


@cli.command()
def run(root: Root = DEFAULT_ROOT) -> None:
    """Measure what is missing, then write the tables. After an interruption a new run continues."""
    experiments = load_experiments(Workspace(root))
    pace = seconds_per_text(experiments)
    run_steps([*experiments.ranking_steps(), draws_step(experiments)], pace, out)
    experiments.choose_best()
    run_steps(projected_steps(experiments), pace, out)
    write(experiments)


@cli.command()
def projections(root: Root = DEFAULT_ROOT) -> None:
    """Measure only projections and thresholds, with the untrained encoder and those trained on 40 % of the tasks."""
    experiments = load_experiments(Workspace(root))
    run_steps(projected_steps(experiments), seconds_per_text(experiments), out)
    write(experiments, (projected.KIND,))


def projected_steps(experiments: Experiments) -> list[Step]:
    study = experiments.study
    return projected.projection_steps(experiments, projected.others_of(read_task_list(), study.tasks, study.spares))


@cli.command()
def gather(root: Root = DEFAULT_ROOT) -> None:
    """Write the tables from what has been measured so far. They name what is missing."""
    write(load_experiments(Workspace(root)))


@cli.command()
def tables() -> None:
    """Write results, tables and plots from the committed rows."""
    write_tables(PAPER_RESULTS)


def write(experiments: Experiments, kinds: Sequence[str] = KINDS) -> None:
    """Write the measured rows of these kinds, and all tables. Raises: TreeChanged, with nothing written."""
    if change_suffix():
        raise TreeChanged("this tree has local changes, which no commit names: commit them, and run `gather`")
    collect(experiments, PAPER_RESULTS, kinds)
    tables()


def seconds_per_text(experiments: Experiments) -> float:
    encoder = experiments.encoder(UNTRAINED)
    texts = [text for task in experiments.study.tasks for text in task.test[:2]]
    encoder.encode(texts[:8])
    started = time.monotonic()
    encoder.encode(texts[8:])
    return (time.monotonic() - started) / len(texts[8:])


def collect(experiments: Experiments, folder: Path, kinds: Sequence[str] = KINDS) -> None:
    """Write all rows of each kind into one file, for this pool only."""
    for kind in kinds:
        parts = [pq.read_table(path) for path in sorted(experiments.rows.glob(f"{kind}*.parquet"))]
        if parts:
            write_parquet(folder / f"retrieval_{kind}.parquet", pa.concat_tables(parts).unify_dictionaries())


if __name__ == "__main__":
    cli()
